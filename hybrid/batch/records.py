"""Lines of output: OpenAI's batch format around a ChatCompletion, a text completion, or an error."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from hybrid.batch.body import Refused
from hybrid.batch.jobs import Answer, Job, Prompts
from hybrid.chat.parser import ReplyParser
from hybrid.chat.plain import PlainParser
from hybrid.chat.tokenizer import Tokenizer

REASONS = {"context": "length"}  # of ours that OpenAI has no word for


def answer_record(job: Job, answer: Answer, prompts: Prompts) -> dict[str, Any]:
    """The line for an answer, which the engine ended as `Request.finish_reason` says."""
    text = [token for token in answer.ids if token not in prompts.stop_ids]
    choice, thoughts = (_spoken if job.asked.is_chat else _continued)(job, text, prompts.tokenizer)
    kind = "chat.completion" if job.asked.is_chat else "text_completion"
    why = answer.finish_reason
    finish = "tool_calls" if why == "stop" and choice.get("message", {}).get("tool_calls") else REASONS.get(why, why)
    body = {
        "id": f"{'chatcmpl' if job.asked.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": prompts.model,
        "choices": [{"index": 0, **choice, "logprobs": None, "finish_reason": finish}],
        "usage": _usage(job, answer, thoughts),
    }
    return _record(job.custom_id, {"status_code": 200, "request_id": f"req_{secrets.token_hex(12)}", "body": body})


def error_record(custom_id: str, why: Refused) -> dict[str, Any]:
    """The line for a request that cannot be answered."""
    error = {"message": str(why), "type": "invalid_request_error", "param": why.param, "code": why.code}
    response = {"status_code": 400, "request_id": f"req_{secrets.token_hex(12)}", "body": {"error": error}}
    return _record(custom_id, response, error)


def _record(custom_id: str, response: dict[str, Any], error: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response, "error": error}


def _spoken(job: Job, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[dict[str, Any], int]:
    """({"message"}, tokens of reasoning)."""
    calls = sum(len(message.tool_calls) for message in job.asked.messages)
    parser, thoughts = ReplyParser.after(job.prompt, tokenizer, calls), 0
    for token in ids:
        thoughts += parser.thinking
        parser.feed(token)
    parser.finish()
    message = parser.message()
    fields = {"refusal": None} | message.to_dict()
    fields["content"] = message.content or (None if message.tool_calls else "")
    return {"message": fields}, thoughts


def _continued(job: Job, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[dict[str, Any], int]:
    parser = PlainParser(tokenizer)
    for token in ids:
        parser.feed(token)
    parser.finish()
    return {"text": parser.message().content}, 0


def _usage(job: Job, answer: Answer, thoughts: int) -> dict[str, Any]:
    prompt, made = len(job.prompt), len(answer.ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": thoughts},
    }
