"""OpenAI's /v1/completions: prompts that are no conversation, as text or ids, several at once."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from hybrid.chat.bodies import TextBody, prompt_ids
from hybrid.chat.message import Text
from hybrid.chat.wishes import Positive
from hybrid.engine.request import TokenLogprobs, token_logprobs
from hybrid.errors import KimiError
from hybrid.kimi import Kimi
from hybrid.likelihood import text_logprobs
from hybrid.reply import Reply
from hybrid.serve.asked import Asked, params
from hybrid.serve.chat import StreamOptions
from hybrid.serve.figures import finish_reason, timings, usage
from hybrid.serve.job import Job
from hybrid.serve.openai_shapes import Completion, TextChoice, TextLogprobs, Usage
from hybrid.serve.refusal import envelope, failure, to_json, unsupported

DEFAULT_TOKENS = 16  # OpenAI's
ECHOED_TOKENS = 4096  # each has a score for every id of the vocabulary: 0.6 MB for Kimi K2.5's


class CompletionRequest(TextBody, Asked):
    max_tokens: Positive | None = DEFAULT_TOKENS
    echo: bool | None = False
    stream_options: StreamOptions | None = None


def prompts(kimi: Kimi, body: CompletionRequest) -> list[list[int]]:
    """The ids of each prompt. Raises Refusal and BadField for what is not there, each by its name."""
    if body.stream and body.logprobs is not None:
        raise unsupported("logprobs", "Likelihoods are told in whole answers only.")
    found = [prompt_ids(kimi.tokenizer, prompt, kimi.config.vocab_size) for prompt in body.prompts()]
    if body.stream and len(found) > 1:
        raise unsupported("stream", "Several prompts are answered whole. Stream one at a time.")
    if body.echo and body.logprobs is not None and max(map(len, found)) > ECHOED_TOKENS:
        raise unsupported("logprobs", f"Likelihoods of prompts are told up to {ECHOED_TOKENS:,} tokens.")
    return found


def start_completion(kimi: Kimi, body: CompletionRequest, prompt: list[int]) -> Callable[..., Reply]:
    """What a Job starts."""
    sampling = params(kimi, body, False)
    return lambda on_progress: kimi.complete(prompt, sampling, on_progress=on_progress)


def echoed_logprobs(kimi: Kimi, body: CompletionRequest, asked: list[list[int]]) -> list[list[TokenLogprobs | int]]:
    """Of each prompt's ids, where they are to be told."""
    if not body.echo or body.logprobs is None:
        return [[] for _ in asked]
    return [prompt_logprobs(kimi, prompt, body.logprobs) for prompt in asked]


def prompt_logprobs(kimi: Kimi, prompt: Sequence[int], count: int) -> list[TokenLogprobs | int]:
    """How likely the model finds each id of `prompt` after those before it; the first one stands as it is."""
    rows = kimi.logits(prompt[:-1]) if len(prompt) > 1 else ()
    told = [token_logprobs(row, token, count) for row, token in zip(rows, prompt[1:], strict=True)]
    return [prompt[0], *told]


class TextForm:
    """Replies as this API's objects, whole or in chunks."""

    def __init__(self, kimi: Kimi, body: CompletionRequest, asked: list[list[int]]) -> None:
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": kimi.name}
        self._head["object"] = "text_completion"
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._tokenizer = kimi.tokenizer if body.logprobs is not None else None
        self._echoed = [kimi.tokenizer.decode(ids, skip_special=False) if body.echo else "" for ids in asked]

    async def whole(
        self, jobs: list[Job], replies: list[Reply], likelihoods: list[list[TokenLogprobs | int]]
    ) -> Completion:
        texts = await asyncio.gather(*(_text(job) for job in jobs))
        choices = [
            _choice(index, echoed + text, finish_reason(reply), self._logprobs(likely, reply))
            for index, (echoed, text, reply, likely) in enumerate(
                zip(self._echoed, texts, replies, likelihoods, strict=True)
            )
        ]
        figures = {"usage": _sum(replies), "timings": timings(replies[0].stats)}
        return {**self._head, "choices": choices, **figures}  # type: ignore[typeddict-item]

    async def stream(self, job: Job, reply: Reply, keep_alive_s: float) -> AsyncIterator[str]:
        if self._echoed[0]:
            yield self._chunk([_choice(0, self._echoed[0], None)])
        try:
            async for event in job.events(keep_alive_s):
                if event is None:
                    yield ": keep-alive\n\n"
                elif isinstance(event, Text):
                    yield self._chunk([_choice(0, event.text, None)])
            yield self._chunk([_choice(0, "", finish_reason(reply))], timings=timings(reply.stats))
            if self._usage:
                yield self._chunk([], usage=usage(reply.stats))
        except KimiError as error:
            yield f"data: {to_json(envelope('', failure(error)))}\n\n"
        yield "data: [DONE]\n\n"

    def _logprobs(self, echoed: list[TokenLogprobs | int], reply: Reply) -> TextLogprobs | None:
        return text_logprobs([*echoed, *reply.logprobs], self._tokenizer) if self._tokenizer is not None else None

    def _chunk(self, choices: list[TextChoice], **more: Any) -> str:
        return f"data: {to_json({**self._head, 'choices': choices, **more})}\n\n"


def _choice(index: int, text: str, reason: Any, logprobs: TextLogprobs | None = None) -> TextChoice:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


async def _text(job: Job) -> str:
    return "".join([event.text async for event in job.events() if isinstance(event, Text)])


def _sum(replies: list[Reply]) -> Usage:
    first, *others = [usage(reply.stats) for reply in replies]
    for other in others:
        first["prompt_tokens"] += other["prompt_tokens"]
        first["completion_tokens"] += other["completion_tokens"]
        first["total_tokens"] += other["total_tokens"]
        first["prompt_tokens_details"]["cached_tokens"] += other["prompt_tokens_details"]["cached_tokens"]
    return first
