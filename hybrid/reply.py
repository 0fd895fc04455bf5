"""One answer being made: an iterator of parts that can be stopped, hurried, and asked for its figures."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from weakref import WeakMethod

from hybrid.chat.message import Message, Part
from hybrid.chat.parser import THINK_END, ReplyParser
from hybrid.chat.plain import PlainParser
from hybrid.chat.reading import Reading
from hybrid.chat.tokenizer import Tokenizer
from hybrid.engine.engine import Engine
from hybrid.engine.request import Request, TokenLogprobs
from hybrid.engine.service import Service
from hybrid.stats import Stats


class Reply:
    """Iterate for Think, Text and ToolCall parts. `stop` and `answer_now` may be called from anywhere, any time."""

    def __init__(
        self,
        engine: Engine | Service,
        tokenizer: Tokenizer,
        request: Request,
        parser: ReplyParser | PlainParser,
        think_budget: int | None,
    ) -> None:
        self._request = request
        self._reading = Reading(parser, request.params.stop, think_budget)
        self._think_end = tokenizer.specials.get(THINK_END)
        self._parts: deque[Part] = deque()
        self._over = False
        self.stats = Stats(prompt_tokens=len(request.prompt))
        self._clock = _Clock(engine, self.stats)
        take = WeakMethod(self._take)  # a reply that nobody listens to any more must not live on in its request
        request.on_token = lambda token: None if (known := take()) is None else known(token)
        self._ids = engine.stream(request)

    def __iter__(self) -> Iterator[Part]:
        return self

    def __next__(self) -> Part:
        while not self._parts and not self._over:
            if next(self._ids, None) is None:
                self._over = True
                self._give(self._reading.finish())
                continue
            if not self.stats.first_token_s:
                self._clock.begin(self._request)
            self._clock.note(self._request)
        if not self._parts:
            raise StopIteration
        return self._parts.popleft()

    def stop(self) -> None:
        """End after the current layer of the prompt, or the current token of the answer."""
        self._request.cancelled = True

    def answer_now(self) -> None:
        """Close the reasoning; does nothing when the model is not reasoning or its vocabulary has no such token."""
        if self._reading.thinking and self._think_end is not None and not self._request.forced:
            self._request.forced.append(self._think_end)

    @property
    def thinking(self) -> bool:
        """Whether the model is reasoning at this moment."""
        return self._reading.thinking

    @property
    def finish_reason(self) -> str:
        """stop, length, context, tool_calls or interrupted; empty while the reply is being made."""
        if self._reading.called and not self._reading.stopped and self._request.finish_reason == "stop":
            return "tool_calls"
        return self._request.finish_reason

    @property
    def stop_string(self) -> str | None:
        """Which of the stop strings ended the answer, if one did."""
        return self._reading.stop_string

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Of all tokens so far, reasoning and control tokens included; empty unless asked for."""
        return self._request.logprobs

    @property
    def message(self) -> Message:
        """The assistant's turn so far."""
        return self._reading.message(interrupted=self._request.finish_reason == "interrupted")

    def _take(self, token: int) -> None:
        """Called as `token` is chosen and before the next one is, perhaps on another thread than the one that listens.

        So what it decides, an end to the reasoning or to the answer, is in time.
        """
        if token in self._request.params.stop_ids:
            return
        parts = self._reading.feed(token)
        self.stats.thinking_tokens, self.stats.answer_tokens = self._reading.thoughts, self._reading.words
        if self._reading.spent:
            self.answer_now()
        self._give(parts)

    def _give(self, parts: list[Part]) -> None:
        self._parts.extend(parts)
        if self._reading.stopped:
            self._request.finish_reason = "stop"


class _Clock:
    """Fills in what there is to measure of a reply, every time that a token has come."""

    def __init__(self, engine: Engine | Service, stats: Stats) -> None:
        self._model = engine.model
        self._stats = stats
        self._started = time.perf_counter()

    def begin(self, request: Request) -> None:
        """The first token is here: decoding is measured from now on."""
        self._first = time.perf_counter()
        self._experts, self._host = self._model.stats.expert_bytes, self._model.host_bytes
        tier = self._model.stats.tier
        self._tier = None if tier is None else replace(tier)
        self._stats.first_token_s = self._first - self._started
        self._stats.cached_tokens = request.cached_tokens
        self._stats.disk_tokens = request.disk_tokens
        self._stats.prefill_s = request.prefill_seconds

    def note(self, request: Request) -> None:
        stats, tier, before = self._stats, self._model.stats.tier, self._tier
        stats.drafted, stats.accepted = request.drafted, request.accepted
        stats.decode_s = time.perf_counter() - self._first
        stats.expert_bytes = self._model.stats.expert_bytes - self._experts
        stats.host_bytes = self._model.host_bytes - self._host
        if tier is not None and before is not None:
            stats.tier_hits = tier.hits - before.hits
            stats.tier_misses = tier.misses - before.misses
            stats.nvme_bytes = tier.nvme_bytes - before.nvme_bytes
            stats.stall_s = tier.stall_s - before.stall_s
