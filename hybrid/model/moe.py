"""The Mixture-of-Experts layer: routed experts, weighted, plus the shared expert, unweighted."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hybrid.memory.expert_store import LayerExperts
from hybrid.memory.router_stats import RouterStats
from hybrid.model.layers import GatedMLP
from hybrid.model.router import Router

ObserveRouting = Callable[[Tensor, Tensor, Tensor], None]


def unobserved(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """The default `observe`."""


@dataclass(frozen=True)
class MoE:
    layer: int
    router: Router
    experts: LayerExperts
    shared: GatedMLP | None
    stats: RouterStats
    observe: ObserveRouting = unobserved  # told the input and what the router made of it

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] (normed) -> [tokens, hidden]; routed outputs are summed in fp32, then rounded once."""
        topk_ids, topk_weights = self.router.forward(x)
        self.observe(x, topk_ids, topk_weights)
        self.stats.record(self.layer, topk_ids.numpy(force=True), self.experts.expert_bytes)
        shared = None if self.shared is None else self.shared.forward(x)  # on a card: runs while the host multiplies
        routed = self.experts.forward(x, topk_ids, topk_weights).to(x.dtype)
        return routed if shared is None else routed + shared
