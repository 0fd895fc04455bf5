"""The engine's loop: prompts in pieces and a token of every answer, in one batch per step.

A request starts when there are pages for its prompt and one more, and takes further ones as it grows. When there are
none, the request that started last makes room and waits, first in line; what it had goes to the prefix cache, and it
goes on from its prompt and what it has answered. The one that started first always gets to its end.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybrid.engine.request import Cancelled, Request
from hybrid.engine.sampler import Sampler, require_finite
from hybrid.errors import KimiError
from hybrid.memory.disk_kv import DiskKV
from hybrid.memory.kv_cache import PAGE_SIZE, pages_for
from hybrid.memory.prefix_cache import PrefixCache
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
    found: int | None = None  # rows that were in the cache when it first started
    started: float = 0.0
    error: KimiError | None = None

    @property
    def answer(self) -> list[int]:
        """The new ids, a stop id included."""
        return self.ids[len(self.request.prompt) :]

    @property
    def is_prompt(self) -> bool:
        """Whether what comes next is part of the prompt."""
        return self.done < len(self.request.prompt)

    @property
    def is_reading(self) -> bool:
        """Whether more comes next than one token of the answer: of the prompt, or of what it had to give up."""
        return self.is_prompt or self.done < len(self.ids) - 1

    @property
    def ended(self) -> bool:
        return bool(self.request.finish_reason) or self.error is not None

    def start(self, pages: list[int], rows: int, from_disk: int) -> None:
        """Go on with `pages`, which hold so many rows already, some of them just read from the disk."""
        self.pages, self.done = pages, rows
        if self.found is None:
            self.found = self.request.cached_tokens = rows
            self.request.disk_tokens = from_disk
            self.started = time.perf_counter()

    def note_layer(self, rows: int) -> None:
        """The work done on a step's layers amounts to so many rows."""
        if self.is_prompt and len(self.ids) == len(self.request.prompt):
            self.request.on_prefill(self.done + rows, len(self.request.prompt))

    def advance(self, count: int) -> None:
        """`count` more ids have their rows."""
        prompt = self.is_prompt and len(self.ids) == len(self.request.prompt)
        self.done += count
        if prompt:
            self.request.prefill_seconds = time.perf_counter() - self.started
            self.request.on_prefill(self.done, len(self.request.prompt))

    def take(self, logits: Tensor) -> None:
        """Choose the next id by logits [vocab], and note if it is the last; or note the error."""
        try:
            token = self.request.choose(self.sampler, logits, self.answer)
        except KimiError as error:
            self.error = error
            return
        self.ids.append(token)
        self.request.note_end(token, len(self.ids) - len(self.request.prompt), full=self.done >= self.longest)


class Scheduler:
    """Requests waiting for pages, in order, and those under way, in the order they started; `step` takes these on."""

    def __init__(
        self,
        model: Transformer,
        cache: PrefixCache,
        *,
        ctx: int,
        batch: int,
        prefill_chunk: int,
        disk: DiskKV | None = None,
    ) -> None:
        """At most `ctx` tokens per sequence, `batch` sequences at once and `prefill_chunk` tokens of prompts a step."""
        self.model = model
        self.cache = cache
        self.disk = disk
        self.ctx = ctx
        self.batch = batch
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, request: Request) -> Sequence:
        """Line up. Raises ContextExceeded when the prompt leaves no room for an answer, UsageError for unknown ids."""
        request.require_room(self.ctx)
        request.require_known(self.model.config.vocab_size)
        longest = min(self.ctx, len(request.prompt) + request.params.max_tokens - 1)  # nothing follows the last one
        sampler = Sampler(request.params, request.prompt)
        self.waiting.append(Sequence(request, sampler, longest, list(request.prompt)))
        return self.waiting[-1]

    def step(self) -> list[Sequence]:
        """One batch through the model. Returns the sequences that ended, some perhaps with their `error`.

        An error in the model itself ends all that took part.
        """
        if self.disk is not None:
            self.disk.advance(self.cache)
        ended = self._drop_cancelled()
        self._admit()
        assert self.running or not self.waiting, "pages are held by somebody else"
        planned = self._plan()
        if not planned:
            return ended
        try:
            self._forward(planned)
        except Cancelled:
            return ended + self._drop_cancelled()
        except KimiError as error:
            for each, _ in planned:
                each.error = error
        return ended + self._remove([each for each in self.running if each.ended])

    def pause(self) -> None:
        """Give all pages to the prefix cache; the next step takes up again what was under way."""
        while self.running:
            self._preempt()

    def close(self) -> None:
        """Give up what is under way and waiting."""
        self._remove([*self.running, *self.waiting])
        self.rest()

    def rest(self) -> None:
        """Between requests there is time for what would hold up a step."""
        if self.disk is not None:
            self.disk.advance(self.cache, rest=True)

    def _drop_cancelled(self) -> list[Sequence]:
        """Sequences removed because their requests were cancelled."""
        found = [each for each in (*self.waiting, *self.running) if each.request.cancelled]
        for each in found:
            each.request.finish_reason = "interrupted"
        return self._remove(found)

    def _remove(self, sequences: list[Sequence]) -> list[Sequence]:
        for each in sequences:
            if each in self.running:
                self.running.remove(each)
                self._keep(each)
                if self.disk is not None and each.error is None and each.request.keep:
                    self.disk.save(self.cache, each.ids[: each.done])
            else:
                self.waiting.remove(each)
        return sequences

    def _keep(self, each: Sequence) -> None:
        """Leave its rows to later requests: of one that failed only those that it had found."""
        if each.error is not None:
            assert each.found is not None
            self.cache.forget(each.ids, each.found)
            each.done = min(each.done, each.found)
        self.cache.keep(each.ids[: each.done], each.pages)

    def _admit(self) -> None:
        """Start who waits, first come first served, while there is room."""
        while self.waiting and len(self.running) < self.batch and self._start(self.waiting[0]):
            self.running.append(self.waiting.popleft())

    def _start(self, each: Sequence) -> bool:
        match = self.cache.find(each.ids[:-1])  # the last one's logits are needed
        wanted = pages_for(min(len(each.ids) + PAGE_SIZE, each.longest))
        if self.cache.available(match) < wanted - len(match.full):
            return False
        from_disk = 0
        if self.disk is not None:
            from_disk = self.disk.recall(self.cache, each.ids[:-1], match)
            match = self.cache.find(each.ids[:-1])
        each.start(*self.cache.open(match, len(each.ids)), from_disk)
        return True

    def _plan(self) -> list[tuple[Sequence, int]]:
        """Who takes part in this step with how many ids: every answer with one, prompts with what the chunk allows."""
        room = self.prefill_chunk
        planned = []
        for each in list(self.running):
            if each not in self.running:
                break  # it and all behind it have made room
            count = min(len(each.ids) - each.done, room) if each.is_reading else 1
            if count and self._grow(each, each.done + count):
                room -= count if each.is_reading else 0
                planned.append((each, count))
        return planned

    def _grow(self, each: Sequence, tokens: int) -> bool:
        """Have pages for `tokens` tokens, at the cost of others who started later; False if it had to go itself."""
        while not self.cache.make_room(pages_for(tokens) - len(each.pages)):
            self.preemptions += 1
            if self._preempt() is each:
                return False
        self.cache.kv.extend(each.pages, tokens)
        return True

    def _preempt(self) -> Sequence:
        """Whoever started last leaves its pages and waits, before all others."""
        last = self.running.pop()
        self._keep(last)
        last.done = 0
        self.waiting.appendleft(last)
        return last

    def _forward(self, planned: list[tuple[Sequence, int]]) -> None:
        """Compute the planned ids, and choose the next one where all of a sequence is computed."""
        h = self.model.forward(self._batch(planned), self.cache.kv)
        ready = []
        stop = 0
        for each, count in planned:
            start, stop = stop, stop + count
            if self._take_rows(each, h[start:stop]) and each.done == len(each.ids):
                ready.append((each, stop - 1))
        if ready:
            logits = self.model.head(h[[row for _, row in ready]])
            for (each, _), scores in zip(ready, logits, strict=True):
                each.take(scores)

    def _take_rows(self, each: Sequence, h: Tensor) -> bool:
        """Count the rows behind hidden states `h` in, and share the pages they fill; False if they are no numbers."""
        try:
            require_finite(h)
        except KimiError as error:
            each.error = error
            return False
        before = each.done // PAGE_SIZE
        each.advance(len(h))
        if each.done // PAGE_SIZE > before:
            self.cache.publish(each.ids[: each.done], each.pages)
        return True

    def _batch(self, planned: list[tuple[Sequence, int]]) -> Batch:
        ids: list[int] = []
        segments = []
        for each, count in planned:
            assert all(self.cache.kv.holders[page] == 1 for page in each.pages[each.done // PAGE_SIZE :])
            segments.append(Segment(len(ids), len(ids) + count, each.done, tuple(each.pages)))
            ids += each.ids[each.done : each.done + count]
        layers = self.model.config.num_hidden_layers

        def on_layer(layer: int) -> None:
            if all(each.request.cancelled for each, _ in planned):
                raise Cancelled
            for each, count in planned:
                each.note_layer(count * layer // layers)

        return Batch(torch.tensor(ids), tuple(segments), on_layer)
