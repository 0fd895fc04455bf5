"""Many requests at once: prompts in pieces and a token of every answer, in one batch per step.

A request waits until the cache has pages for the longest it may become, so once admitted it always reaches its end.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybrid.engine.request import Cancelled, Request
from hybrid.engine.sampler import Sampler
from hybrid.memory.kv_cache import PAGE_SIZE, KVCache
from hybrid.model.batch import Batch, Segment
from hybrid.model.transformer import Transformer


@dataclass(eq=False)
class Sequence:
    """A request with what has become of it: `ids` are its prompt and answer, `done` of them have rows in `pages`."""

    request: Request
    sampler: Sampler
    longest: int  # rows it may come to need
    ids: list[int]
    done: int = 0
    pages: list[int] = field(default_factory=list)
    admitted: float = 0.0

    @property
    def answer(self) -> list[int]:
        """The new ids, a stop id included."""
        return self.ids[len(self.request.prompt) :]

    @property
    def is_prompt(self) -> bool:
        """Whether what comes next is part of the prompt."""
        return self.done < len(self.request.prompt)

    def advance(self, count: int) -> None:
        """`count` more ids have their rows."""
        prompt = self.is_prompt
        self.done += count
        if prompt:
            self.request.prefill_seconds = time.perf_counter() - self.admitted
            self.request.on_prefill(self.done, len(self.request.prompt))

    def take(self, logits: Tensor) -> None:
        """Choose the next id by logits [vocab], and note if it is the last."""
        token = self.request.choose(self.sampler, logits)
        self.ids.append(token)
        self.request.note_end(token, len(self.answer), full=self.done >= self.longest)


class Scheduler:
    """Requests waiting for pages, in order, and those under way; `step` takes these on."""

    def __init__(self, model: Transformer, kv: KVCache, *, ctx: int, batch: int, prefill_chunk: int) -> None:
        """At most `ctx` tokens per sequence, `batch` sequences at once and `prefill_chunk` tokens of prompts a step."""
        self.model = model
        self.kv = kv
        self.ctx = ctx
        self.batch = batch
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, request: Request) -> Sequence:
        """Line up. Raises ContextExceeded when the prompt leaves no room for an answer."""
        request.require_room(self.ctx)
        longest = min(self.ctx, len(request.prompt) + request.params.max_tokens - 1)  # nothing follows the last one
        self.waiting.append(Sequence(request, Sampler(request.params), longest, list(request.prompt)))
        return self.waiting[-1]

    def step(self) -> list[Sequence]:
        """One batch through the model. Returns the sequences that ended, their pages free again."""
        ended = self._drop_cancelled()
        self._admit()
        assert self.running or not self.waiting, "pages are held by somebody else"
        planned = self._plan()
        if planned:
            try:
                self._forward(planned)
            except Cancelled:
                ended += self._drop_cancelled()
        return ended + self._remove([each for each in self.running if each.request.finish_reason])

    def close(self) -> None:
        """Give up what is under way and waiting."""
        self._remove(list(self.running))
        self.waiting.clear()

    def _drop_cancelled(self) -> list[Sequence]:
        """Sequences removed because their requests were cancelled."""
        found = [each for each in (*self.waiting, *self.running) if each.request.cancelled]
        for each in found:
            each.request.finish_reason = "interrupted"
        return self._remove(found)

    def _remove(self, sequences: list[Sequence]) -> list[Sequence]:
        for each in sequences:
            self.kv.release(each.pages)
            (self.running if each in self.running else self.waiting).remove(each)
        return sequences

    def _admit(self) -> None:
        """Start who waits, first come first served, while there are pages for all that each may need."""
        while self.waiting and len(self.running) < self.batch:
            first = self.waiting[0]
            if first.longest > len(self.kv.free) * PAGE_SIZE:
                return
            self.kv.extend(first.pages, first.longest)
            first.admitted = time.perf_counter()
            self.running.append(self.waiting.popleft())

    def _plan(self) -> list[tuple[Sequence, int]]:
        """Who takes part in this step with how many ids: every answer with one, prompts with what the chunk allows."""
        room = self.prefill_chunk
        planned = []
        for each in self.running:
            count = min(len(each.ids) - each.done, room) if each.is_prompt else 1
            room -= count if each.is_prompt else 0
            if count:
                planned.append((each, count))
        return planned

    def _forward(self, planned: list[tuple[Sequence, int]]) -> None:
        """Compute the planned ids, and choose the next one where all of a sequence is computed."""
        h = self.model.forward(self._batch(planned), self.kv)
        last, ready = -1, []
        for each, count in planned:
            each.advance(count)
            last += count
            if not each.is_prompt:
                ready.append((each, last))
        if ready:
            logits = self.model.head(h[[row for _, row in ready]])
            for (each, _), scores in zip(ready, logits, strict=True):
                each.take(scores)

    def _batch(self, planned: list[tuple[Sequence, int]]) -> Batch:
        ids: list[int] = []
        segments = []
        for each, count in planned:
            segments.append(Segment(len(ids), len(ids) + count, each.done, tuple(each.pages)))
            ids += each.ids[each.done : each.done + count]

        def on_layer(layer: int) -> None:
            if all(each.request.cancelled for each, _ in planned):
                raise Cancelled

        return Batch(torch.tensor(ids), tuple(segments), on_layer)
