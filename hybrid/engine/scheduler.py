"""The engine's loop: prompts in pieces and a token of every answer, in one batch per step.

A request starts when there are pages for its prompt and one more, and takes further ones as it grows. When there are
none, the request that started last makes room and waits, first in line; what it had goes to the prefix cache, and it
goes on from its prompt and what it has answered. The one that started first always gets to its end.

A step may also compute ids that were only drafted to follow an answer. What comes is chosen row by row, as if the ids
had come one per step: the first that is not as drafted ends it, and no row beyond is ever counted as done.
"""

from collections import deque

import torch
from torch import Tensor

from hybrid.engine.request import Cancelled, Request
from hybrid.engine.sampler import Sampler, require_finite
from hybrid.engine.sequence import Part, Sequence
from hybrid.engine.speculation import ROWS, Gauge
from hybrid.errors import KimiError
from hybrid.memory.disk_kv import DiskKV
from hybrid.memory.kv_cache import PAGE_SIZE, pages_for
from hybrid.memory.prefix_cache import PrefixCache
from hybrid.model.batch import Batch, Segment
from hybrid.model.transformer import Transformer


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
        gauge: Gauge | None = None,
    ) -> None:
        """At most `ctx` tokens per sequence, `batch` sequences at once and `prefill_chunk` tokens of prompts a step.

        As many ids are drafted as `gauge` says; without one, none.
        """
        self.model = model
        self.cache = cache
        self.disk = disk
        self.gauge = gauge
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
            self._compute(planned)
        except Cancelled:
            return ended + self._drop_cancelled()
        except KimiError as error:
            for part in planned:
                part.sequence.error = error
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

    def _plan(self) -> list[Part]:
        """Who takes part in this step with how many ids: every answer with one, prompts with what the chunk allows."""
        room = self.prefill_chunk
        planned = []
        for each in list(self.running):
            if each not in self.running:
                break  # it and all behind it have made room
            count = min(len(each.ids) - each.done, room) if each.is_reading else 1
            if count and self._grow(each, each.done + count):
                room -= count if each.is_reading else 0
                planned.append(Part(each, count, []))
        return planned

    def _compute(self, planned: list[Part]) -> None:
        """`_forward`, with ids drafted where a few answers go on and nothing else; its seconds tell what that costs."""
        if self.gauge is None or len(planned) >= ROWS or any(part.sequence.is_reading for part in planned):
            self._forward(planned)
            return
        planned = self._draft(planned, self.gauge)
        began = self.gauge.clock()
        self._forward(planned)
        self.gauge.note(len(planned), sum(part.rows for part in planned), self.gauge.clock() - began)

    def _draft(self, planned: list[Part], gauge: Gauge) -> list[Part]:
        """The same with as many ids drafted as pay."""
        drafts = {each: draft for each, _, _ in planned if (draft := each.drafter.draft(each.ids))}
        most = gauge.choose(len(planned), [each.drafter.hope for each in drafts])
        return [Part(each, count, self._fitting(each, drafts.get(each, [])[:most])) for each, count, _ in planned]

    def _fitting(self, each: Sequence, draft: list[int]) -> list[int]:
        """As much of `draft` as may be needed and has room: nobody's pages are taken for it."""
        draft = draft[: each.longest - len(each.ids)]
        tokens = len(each.ids) + len(draft)
        if pages_for(tokens) - len(each.pages) > len(self.cache.kv.free):
            return []
        self.cache.kv.extend(each.pages, tokens)
        return draft

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

    def _forward(self, planned: list[Part]) -> None:
        """Compute the planned ids, and choose the next one where all of a sequence is computed."""
        hidden = self.model.forward(self._batch(planned), self.cache.kv).split([part.rows for part in planned])
        ready = []
        for part, h in zip(planned, hidden, strict=True):
            each = part.sequence
            if self._take_rows(each, h[: part.known]) and each.done == len(each.ids):
                ready.append((part, h[part.known - 1 :]))
        if ready:
            logits = self.model.head(torch.cat([h for _, h in ready])).split([len(h) for _, h in ready])
            for (part, h), scores in zip(ready, logits, strict=True):
                self._answer(part, h, scores)

    def _answer(self, part: Part, h: Tensor, logits: Tensor) -> None:
        """Choose an id by each row of `logits`, and go on to the next row while that is the id drafted for it."""
        each, drafted = part.sequence, part.drafted
        each.take(logits[0])
        for row, token in enumerate(drafted, start=1):
            if each.ended or each.ids[-1] != token or not self._take_rows(each, h[row : row + 1]):
                break
            each.request.accepted += 1
            each.take(logits[row])
        each.request.drafted += len(drafted)
        self.cache.kv.release(each.pages, len(each.ids))

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

    def _batch(self, planned: list[Part]) -> Batch:
        ids: list[int] = []
        segments = []
        for each, count, drafted in planned:
            assert all(self.cache.kv.holders[page] == 1 for page in each.pages[each.done // PAGE_SIZE :])
            start = len(ids)
            ids += each.ids[each.done : each.done + count] + drafted
            segments.append(Segment(start, len(ids), each.done, tuple(each.pages)))
        layers = self.model.config.num_hidden_layers

        def on_layer(layer: int) -> None:
            if all(part.sequence.request.cancelled for part in planned):
                raise Cancelled
            for part in planned:
                part.sequence.note_layer(part.known * layer // layers)

        return Batch(torch.tensor(ids), tuple(segments), on_layer)
