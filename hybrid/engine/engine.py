"""Ids in, ids out: prefill in chunks, then one token at a time, keeping what was computed for the next request."""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hybrid.engine.request import Cancelled, Request, require_room
from hybrid.engine.sampler import Sampler, require_finite
from hybrid.engine.scheduler import Scheduler
from hybrid.errors import KimiError
from hybrid.memory.kv_cache import KVCache
from hybrid.model.batch import Batch, Segment
from hybrid.model.transformer import Transformer


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Engine:
    """Sequences over a paged cache: one whose prefix the next one may share, or many at once."""

    def __init__(self, model: Transformer, kv: KVCache, prefill_chunk: int, ctx: int) -> None:
        """No sequence gets longer than `ctx` tokens; the cache may hold more."""
        assert ctx <= kv.capacity, (ctx, kv.capacity)
        self.model = model
        self.kv = kv
        self.prefill_chunk = prefill_chunk
        self.ctx = ctx
        self.tokens: list[int] = []  # the ids whose rows are in the cache
        self.page_table: list[int] = []

    def stream(self, request: Request) -> Iterator[int]:
        """Yield new ids until a stop id, a limit or cancellation; the reason is left in `request.finish_reason`.

        Stop ids are yielded too. Raises ContextExceeded before computing anything when the prompt leaves no room.
        """
        request.require_room(self.ctx)
        return self._run(request)

    def stream_many(self, requests: Sequence[Request], batch: int) -> Iterator[tuple[int, list[int]]]:
        """(index, new ids) of each request as it ends, up to `batch` of them running at once, others waiting for pages.

        Otherwise as `stream`; the prefix in the cache is given up. Raises ContextExceeded before computing anything.
        """
        for request in requests:
            request.require_room(self.ctx)
        return self._run_many(requests, batch)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """fp32 [tokens, vocab]: what follows every prefix of `token_ids`, computed afresh. Raises KimiError on NaN."""
        require_room(len(token_ids), self.ctx)
        self._keep(0)
        parts = []
        for start in range(0, len(token_ids), self.prefill_chunk):
            parts.append(self.model.head(self._step(token_ids[start : start + self.prefill_chunk])))
            require_finite(parts[-1])
        return torch.cat(parts)

    def _run(self, request: Request) -> Iterator[int]:
        sampler = Sampler(request.params)
        try:
            logits = self._prefill(request)
            for count in range(1, request.params.max_tokens + 1):
                token = request.choose(sampler, logits)
                yield token
                request.note_end(token, count, full=len(self.tokens) >= self.ctx)
                if request.finish_reason:
                    return
                logits = self.model.head(self._step([token], request))[0]
        except Cancelled:
            request.finish_reason = "interrupted"
        except KimiError:
            self._keep(0)  # rows that are not numbers must not be found again by a later prompt
            raise

    def _run_many(self, requests: Sequence[Request], batch: int) -> Iterator[tuple[int, list[int]]]:
        self._keep(0)
        scheduler = Scheduler(self.model, self.kv, ctx=self.ctx, batch=batch, prefill_chunk=self.prefill_chunk)
        try:
            numbers = {scheduler.add(request): number for number, request in enumerate(requests)}
            while numbers:
                for ended in scheduler.step():
                    yield numbers.pop(ended), ended.answer
        finally:
            scheduler.close()

    def _prefill(self, request: Request) -> Tensor:
        """Logits [vocab] after the prompt, computing only what the cache does not hold."""
        start = time.perf_counter()
        prompt = request.prompt
        self._keep(min(common_prefix(self.tokens, prompt), len(prompt) - 1))  # the last token's logits are needed
        request.cached_tokens = len(self.tokens)
        h = torch.empty(0)
        while len(self.tokens) < len(prompt):
            done = len(self.tokens)
            h = self._step(prompt[done : done + self.prefill_chunk], request)
        request.prefill_seconds = time.perf_counter() - start
        request.on_prefill(len(prompt), len(prompt))
        return self.model.head(h[-1:])[0]

    def _keep(self, tokens: int) -> None:
        """Forget everything in the cache beyond the first `tokens` tokens."""
        self.kv.release(self.page_table, tokens)
        del self.tokens[tokens:]

    def _step(self, token_ids: Sequence[int], request: Request | None = None) -> Tensor:
        """Hidden states of `token_ids`, appended to the sequence in the cache."""
        past, count = len(self.tokens), len(token_ids)
        layers = self.model.config.num_hidden_layers

        def on_layer(layer: int) -> None:
            if request is None:
                return
            if request.cancelled:
                raise Cancelled
            if past < len(request.prompt):
                request.on_prefill(past + count * layer // layers, len(request.prompt))

        self.kv.extend(self.page_table, past + count)
        segment = Segment(0, count, past, tuple(self.page_table))
        h = self.model.forward(Batch(torch.tensor(token_ids), (segment,), on_layer), self.kv)
        self.tokens.extend(token_ids)
        return h
