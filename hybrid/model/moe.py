"""The Mixture-of-Experts layer: routed experts, weighted, plus the shared expert, unweighted.

Where a card holds copies of some experts (`Hot`), a layer's pairs of a token and an expert are split: the card
multiplies those whose expert it holds while the host multiplies the others, and the two sums are added. One small copy
each way, and the host waits for the card once, when it takes the layer's input.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.config import ModelConfig
from hybrid.memory.expert_cache import ExpertCache
from hybrid.memory.expert_store import LayerExperts
from hybrid.memory.router_stats import RouterStats
from hybrid.model.layers import GatedMLP
from hybrid.model.router import Router

FEW = 16  # tokens of a step whose copies have pinned memory of their own

ObserveRouting = Callable[[Tensor, Tensor, Tensor], None]


def unobserved(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """The default `observe`."""


class Crossing:
    """Rows on their way between a device and the host; those of a decode step through memory pinned beforehand.

    One set of buffers serves all layers. A copy to the device may be under way when `up` returns, and its buffer is
    written again only after the next `down`, which waits for all that was started before.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, cache: ExpertCache) -> None:
        self._device = device
        self._counters = cache.counters
        self._down: list[Tensor] = []
        self._up: dict[torch.dtype, Tensor] = {}
        if device.type == "cuda" and torch.cuda.is_available():
            k, types = config.num_experts_per_tok, (torch.int64, torch.float32)
            ids, weights, slots = (torch.empty(FEW, k, dtype=t, pin_memory=True) for t in (*types, torch.int64))
            x, y = (torch.empty(FEW, config.hidden_size, dtype=t, pin_memory=True) for t in (dtype, torch.float32))
            self._down, self._up = [x, ids, weights], {torch.int64: slots, torch.float32: y}

    def down(self, *rows: Tensor) -> list[Tensor]:
        """x, topk_ids and topk_weights on the host, once they are computed; good until the next call."""
        if self._device.type == "cpu":
            return list(rows)
        start = time.perf_counter()
        if self._down and len(rows[0]) <= FEW:
            buffers = zip(self._down, rows, strict=True)
            found = [buffer[: len(part)].copy_(part, non_blocking=True) for buffer, part in buffers]
            torch.cuda.current_stream(self._device).synchronize()
        else:
            found = [part.to("cpu") for part in rows]
        self._counters.stall_s += time.perf_counter() - start
        return found

    def up(self, rows: Tensor) -> Tensor:
        """Slots int64 [tokens, k] or sums fp32 [tokens, hidden] on the device."""
        buffer = self._up.get(rows.dtype)
        if buffer is None or len(rows) > FEW:
            return rows.to(self._device)
        return buffer[: len(rows)].copy_(rows).to(self._device, non_blocking=True)


@dataclass(frozen=True)
class Hot:
    """One layer's experts in the memory of a card."""

    cache: ExpertCache
    experts: LayerExperts  # of the slots, whose numbers stand in place of ids
    crossing: Crossing


@dataclass(frozen=True)
class MoE:
    layer: int
    router: Router
    experts: LayerExperts
    shared: GatedMLP | None
    stats: RouterStats
    observe: ObserveRouting = unobserved  # told the input and what the router made of it
    hot: Hot | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] (normed) -> [tokens, hidden]; routed outputs are summed in fp32, then rounded once."""
        topk_ids, topk_weights = self.router.forward(x)
        self.observe(x, topk_ids, topk_weights)
        if self.hot is not None:
            return self._split(self.hot, x, topk_ids, topk_weights)
        x_host, ids, weights = (part.to("cpu") for part in (x, topk_ids, topk_weights))
        self.stats.record(self.layer, ids.numpy(), self.experts.expert_bytes)
        shared = None if self.shared is None else self.shared.forward(x)  # on a card: runs while the host multiplies
        routed = self.experts.forward(x_host, ids, weights).to(x.device).to(x.dtype)
        return routed if shared is None else routed + shared

    def _split(self, hot: Hot, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The same with some experts on a card; all that it is to do is started before the host begins."""
        x_host, ids, weights = hot.crossing.down(x, topk_ids, topk_weights)
        sizes = self.experts.expert_bytes
        self.stats.record(self.layer, ids.numpy(), sizes * hot.cache.absent(self.layer))
        hot.cache.note(self.layer, ids.numpy(), sizes)
        slots = hot.cache.split(self.layer, ids)
        absent = slots == hot.cache.count
        shared = None if self.shared is None else self.shared.forward(x)
        sums = []
        if bool((~absent).any()):
            sums.append(hot.experts.forward(x, hot.crossing.up(slots), topk_weights))
        if bool(absent.any()):
            sums.append(hot.crossing.up(of_pairs(self.experts, x_host, ids, weights, absent)))
        routed = (sums[0] if len(sums) == 1 else sums[0] + sums[1]).to(x.dtype)
        return routed if shared is None else routed + shared


def of_pairs(experts: LayerExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, chosen: Tensor) -> Tensor:
    """`experts.forward` of those pairs alone that `chosen` bool [tokens, k] marks: fp32 [tokens, hidden]."""
    if bool(chosen.all()):
        return experts.forward(x, topk_ids, topk_weights)
    ids, weights, tokens = topk_ids[chosen], topk_weights[chosen], chosen.nonzero()[:, 0]
    if len(x) == 1:
        return experts.forward(x, ids[None], weights[None])
    each = experts.forward(x[tokens], ids[:, None], weights[:, None])  # a row per pair: kernels take k of each token
    return torch.zeros(x.shape, dtype=torch.float32).index_add_(0, tokens, each)
