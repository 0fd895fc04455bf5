"""Lines of output: OpenAI's batch format around a ChatCompletion, a text completion, or an error."""

import secrets
import time
from typing import Any

from hybrid.batch.body import Refused
from hybrid.batch.jobs import Answer, Job, Prompts
from hybrid.chat.message import Message
from hybrid.chat.parser import ReplyParser
from hybrid.chat.plain import PlainParser
from hybrid.chat.reading import Reading
from hybrid.chat.tokenizer import Tokenizer
from hybrid.likelihood import chat_logprobs, text_logprobs

REASONS = {"context": "length"}  # of ours that OpenAI has no word for


def answer_record(job: Job, answer: Answer, prompts: Prompts) -> dict[str, Any]:
    """The line for an answer, which the engine ended as `Request.finish_reason` says."""
    read = reading(job, prompts.tokenizer)
    message = read.read(answer.ids, prompts.stop_ids)
    choice = _choice(message, chat=job.asked.is_chat)
    kind = "chat.completion" if job.asked.is_chat else "text_completion"
    why = answer.finish_reason
    called = why == "stop" and read.called and not read.stopped
    finish = "tool_calls" if called else REASONS.get(why, why)
    logprobs = _logprobs(job, answer, prompts.tokenizer)
    body = {
        "id": f"{'chatcmpl' if job.asked.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": prompts.model,
        "choices": [{"index": 0, **choice, "logprobs": logprobs, "finish_reason": finish}],
        "usage": _usage(job, answer, read.thoughts),
    }
    return _record(job.custom_id, {"status_code": 200, "request_id": f"req_{secrets.token_hex(12)}", "body": body})


def error_record(custom_id: str, why: Refused) -> dict[str, Any]:
    """The line for a request that cannot be answered."""
    error = {"message": str(why), "type": "invalid_request_error", "param": why.param, "code": why.code}
    response = {"status_code": 400, "request_id": f"req_{secrets.token_hex(12)}", "body": {"error": error}}
    return _record(custom_id, response, error)


def _record(custom_id: str, response: dict[str, Any], error: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response, "error": error}


def reading(job: Job, tokenizer: Tokenizer) -> Reading:
    """What the ids of the job's answer are to be fed to."""
    stop = job.sampling.get("stop", ())
    if not job.asked.is_chat:
        return Reading(PlainParser(tokenizer), stop)
    calls = sum(len(message.tool_calls) for message in job.asked.messages)
    return Reading(ReplyParser.after(job.prompt, tokenizer, calls), stop, job.asked.think_budget)


def _choice(message: Message, *, chat: bool) -> dict[str, Any]:
    if not chat:
        return {"text": message.content}
    fields = {"refusal": None} | message.to_dict()
    fields["content"] = message.content or (None if message.tool_calls else "")
    return {"message": fields}


def _logprobs(job: Job, answer: Answer, tokenizer: Tokenizer) -> Any:
    if job.sampling.get("logprobs") is None:
        return None
    if job.asked.is_chat:
        return {"content": chat_logprobs(answer.logprobs, tokenizer)}
    return text_logprobs(answer.logprobs, tokenizer)


def _usage(job: Job, answer: Answer, thoughts: int) -> dict[str, Any]:
    prompt, made = len(job.prompt), len(answer.ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": thoughts},
    }
