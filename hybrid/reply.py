"""One answer being made: an iterator of parts that can be stopped, hurried, and asked for its figures."""

import time
from collections.abc import Iterator
from dataclasses import replace

from hybrid.chat.message import Message, Part, ToolCall
from hybrid.chat.parser import ReplyParser
from hybrid.chat.tokenizer import Tokenizer
from hybrid.engine.engine import Engine
from hybrid.engine.request import Request
from hybrid.stats import Stats

THINK_END = "</think>"


class Reply:
    """Iterate for Think, Text and ToolCall parts. `stop` and `answer_now` may be called from anywhere, any time."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, request: Request, parser: ReplyParser, think_budget: int | None
    ) -> None:
        self._engine = engine
        self._request = request
        self._parser = parser
        self._think_end = tokenizer.specials.get(THINK_END)
        self._think_budget = think_budget
        self._called = False
        self.stats = Stats(prompt_tokens=len(request.prompt))
        self._iterator = self._run(engine.stream(request))

    def __iter__(self) -> Iterator[Part]:
        return self

    def __next__(self) -> Part:
        return next(self._iterator)

    def stop(self) -> None:
        """End after the current layer of the prompt, or the current token of the answer."""
        self._request.cancelled = True

    def answer_now(self) -> None:
        """Close the reasoning; does nothing when the model is not reasoning or its vocabulary has no such token."""
        if self._parser.thinking and self._think_end is not None and not self._request.forced:
            self._request.forced.append(self._think_end)

    @property
    def thinking(self) -> bool:
        """Whether the model is reasoning at this moment."""
        return self._parser.thinking

    @property
    def finish_reason(self) -> str:
        """stop, length, context, tool_calls or interrupted; empty while the reply is being made."""
        if self._called and self._request.finish_reason == "stop":
            return "tool_calls"
        return self._request.finish_reason

    @property
    def message(self) -> Message:
        """The assistant's turn so far."""
        return self._parser.message(interrupted=self._request.finish_reason == "interrupted")

    def _run(self, ids: Iterator[int]) -> Iterator[Part]:
        started = time.perf_counter()
        first = 0.0
        experts_before = host_before = 0
        model = self._engine.model
        tier = tier_before = model.stats.tier
        for token in ids:
            now = time.perf_counter()
            if not first:
                first, experts_before, host_before = now, model.stats.expert_bytes, model.host_bytes
                tier_before = None if tier is None else replace(tier)
                self._note_prefill(now - started)
            self.stats.decode_s = now - first
            self.stats.expert_bytes = model.stats.expert_bytes - experts_before
            self.stats.host_bytes = model.host_bytes - host_before
            if tier is not None and tier_before is not None:
                self.stats.tier_hits = tier.hits - tier_before.hits
                self.stats.tier_misses = tier.misses - tier_before.misses
                self.stats.nvme_bytes = tier.nvme_bytes - tier_before.nvme_bytes
                self.stats.stall_s = tier.stall_s - tier_before.stall_s
            if token not in self._request.params.stop_ids:
                yield from self._take(token)
        yield from self._emit(self._parser.finish())

    def _note_prefill(self, seconds: float) -> None:
        self.stats.first_token_s = seconds
        self.stats.cached_tokens = self._request.cached_tokens
        self.stats.prefill_s = self._request.prefill_seconds

    def _take(self, token: int) -> Iterator[Part]:
        if self._parser.thinking:
            self.stats.thinking_tokens += 1
        else:
            self.stats.answer_tokens += 1
        parts = self._parser.feed(token)
        if self._think_budget is not None and self.stats.thinking_tokens >= self._think_budget:
            self.answer_now()
        yield from self._emit(parts)

    def _emit(self, parts: list[Part]) -> Iterator[Part]:
        for part in parts:
            self._called = self._called or isinstance(part, ToolCall)
            yield part
