"""Ids in, ids out: one scheduler per stream or set of streams, and one cache that all of them share."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hybrid.engine.request import Request, require_room
from hybrid.engine.sampler import require_finite
from hybrid.engine.scheduler import Scheduler
from hybrid.engine.sequence import Sequence as Running
from hybrid.engine.speculation import Gauge
from hybrid.memory.disk_kv import DiskKV
from hybrid.memory.kv_cache import KVCache, pages_for
from hybrid.memory.prefix_cache import PrefixCache
from hybrid.model.batch import Batch, Segment
from hybrid.model.transformer import Transformer


class Engine:
    """Sequences over a paged cache, one or many at once. One thread at a time may use it."""

    def __init__(
        self,
        model: Transformer,
        kv: KVCache,
        prefill_chunk: int,
        ctx: int,
        disk: DiskKV | None = None,
        gauge: Gauge | None = None,
    ) -> None:
        """No sequence gets longer than `ctx` tokens; the cache may hold more, and `disk` what was in it before.

        With a `gauge` ids are drafted where that pays.
        """
        assert ctx <= kv.capacity, (ctx, kv.capacity)
        self.model = model
        self.kv = kv
        self.cache = PrefixCache(kv)
        self.disk = disk
        self.gauge = gauge
        self.prefill_chunk = prefill_chunk
        self.ctx = ctx
        self._active: Scheduler | None = None

    @property
    def tokens(self) -> list[int]:
        """The ids, with rows in the cache, of the sequence that ended last."""
        return self.cache.latest

    def stream(self, request: Request) -> Iterator[int]:
        """Yield new ids until a stop id, a limit or cancellation; the reason is left in `request.finish_reason`.

        Stop ids are yielded too. Raises ContextExceeded before computing anything when the prompt leaves no room, and
        UsageError for ids that the model does not have.
        """
        scheduler = self.scheduler(1)
        return self._follow(scheduler, scheduler.add(request))

    def stream_many(self, requests: Sequence[Request], batch: int) -> Iterator[tuple[int, list[int]]]:
        """(index, new ids) of each request as it ends, up to `batch` of them running at once, others waiting for pages.

        Otherwise as `stream`; the first error ends all of them.
        """
        scheduler = self.scheduler(batch)
        numbers = {scheduler.add(request): number for number, request in enumerate(requests)}
        return self._follow_many(scheduler, numbers)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """fp32 [tokens, vocab]: what follows every prefix of `token_ids`, computed afresh. Raises KimiError on NaN."""
        require_room(len(token_ids), self.ctx)
        self._turn_to(None)
        found = self.cache.make_room(pages_for(len(token_ids)))
        assert found, "pages are held by somebody else"
        pages: list[int] = []
        self.kv.extend(pages, len(token_ids))
        try:
            chunks = range(0, len(token_ids), self.prefill_chunk)
            return torch.cat([self._logits(token_ids[at : at + self.prefill_chunk], at, pages) for at in chunks])
        finally:
            self.kv.release(pages)

    def forget(self) -> None:
        """Empty the cache; what is on disk stays."""
        self._turn_to(None)
        self.cache.clear()

    def close(self) -> None:
        """Have the disk keep what it is to keep."""
        if self.disk is not None:
            self.disk.close(self.cache)

    def scheduler(self, batch: int) -> Scheduler:
        """One for up to `batch` sequences at once, to be taken on by `advance`; close it in the end."""
        return Scheduler(
            self.model,
            self.cache,
            ctx=self.ctx,
            batch=batch,
            prefill_chunk=self.prefill_chunk,
            disk=self.disk,
            gauge=self.gauge,
        )

    def advance(self, scheduler: Scheduler) -> list[Running]:
        """A step of `scheduler`: the sequences that ended. Another one that was under way pauses for it."""
        self._turn_to(scheduler)
        return scheduler.step()

    def _turn_to(self, scheduler: Scheduler | None) -> None:
        """A stream that nobody asks for its next token must not keep pages from others."""
        if self._active is not None and self._active is not scheduler:
            self._active.pause()
        self._active = scheduler

    def _follow(self, scheduler: Scheduler, sequence: Running) -> Iterator[int]:
        try:
            while not sequence.ended:
                given = len(sequence.ids)
                self.advance(scheduler)
                yield from sequence.ids[given:]
        finally:
            scheduler.close()
        if sequence.error is not None:
            raise sequence.error

    def _follow_many(self, scheduler: Scheduler, numbers: dict[Running, int]) -> Iterator[tuple[int, list[int]]]:
        try:
            while numbers:
                for ended in self.advance(scheduler):
                    if ended.error is not None:
                        raise ended.error
                    yield numbers.pop(ended), ended.answer
        finally:
            scheduler.close()

    def _logits(self, token_ids: Sequence[int], past: int, pages: list[int]) -> Tensor:
        segment = Segment(0, len(token_ids), past, tuple(pages))
        logits = self.model.head(self.model.forward(Batch(torch.tensor(token_ids), (segment,)), self.kv))
        require_finite(logits)
        return logits
