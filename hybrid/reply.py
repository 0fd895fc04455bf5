"""One answer being made: an iterator of parts that can be stopped, hurried, and asked for its figures."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from weakref import WeakMethod

from hybrid.chat.message import Message, Part, Text, ToolCall
from hybrid.chat.parser import THINK_END, ReplyParser
from hybrid.chat.plain import PlainParser
from hybrid.chat.stops import Stops
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
        self._parser = parser
        self._think_end = tokenizer.specials.get(THINK_END)
        self._think_budget = think_budget
        self._stops = Stops(request.params.stop)
        self._parts: deque[Part] = deque()
        self._called = self._over = False
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
                self._finish()
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
        if self._parser.thinking and self._think_end is not None and not self._request.forced:
            self._request.forced.append(self._think_end)

    @property
    def thinking(self) -> bool:
        """Whether the model is reasoning at this moment."""
        return self._parser.thinking

    @property
    def finish_reason(self) -> str:
        """stop, length, context, tool_calls or interrupted; empty while the reply is being made."""
        if self._called and self._stops.found is None and self._request.finish_reason == "stop":
            return "tool_calls"
        return self._request.finish_reason

    @property
    def stop_string(self) -> str | None:
        """Which of the stop strings ended the answer, if one did."""
        return self._stops.found

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Of all tokens so far, reasoning and control tokens included; empty unless asked for."""
        return self._request.logprobs

    @property
    def message(self) -> Message:
        """The assistant's turn so far."""
        message = self._parser.message(interrupted=self._request.finish_reason == "interrupted")
        return replace(message, content=message.content[: len(message.content) - self._stops.behind])

    def _take(self, token: int) -> None:
        """Called as `token` is chosen and before the next one is, perhaps on another thread than the one that listens.

        So what it decides, an end to the reasoning or to the answer, is in time.
        """
        if token in self._request.params.stop_ids:
            return
        if self._parser.thinking:
            self.stats.thinking_tokens += 1
        else:
            self.stats.answer_tokens += 1
        parts = self._parser.feed(token)
        if self._think_budget is not None and self.stats.thinking_tokens >= self._think_budget:
            self.answer_now()
        self._give(parts)

    def _give(self, parts: list[Part]) -> None:
        for part in parts:
            if isinstance(part, Text):
                self._give_text(self._stops.feed(part.text))
            elif self._stops.found is None:
                self._give_text(self._stops.flush())
                self._called = self._called or isinstance(part, ToolCall)
                self._parts.append(part)
        if self._stops.found is not None:
            self._request.finish_reason = "stop"

    def _give_text(self, text: str) -> None:
        if text:
            self._parts.append(Text(text))

    def _finish(self) -> None:
        self._over = True
        if self._stops.found is None:
            self._give(self._parser.finish())
            self._give_text(self._stops.flush())


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
