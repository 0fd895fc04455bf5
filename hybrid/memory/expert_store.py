"""Every routed expert on the host, in the layout its kernel reads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hybrid.checkpoint import Checkpoint, Expert, Int4Weight
from quant import int4_g32, kernels


class LayerExperts(Protocol):
    """The routed experts of one layer."""

    @property
    def expert_bytes(self) -> int:
        """Bytes read to apply one expert once."""
        ...

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Sum of the chosen experts, weighted: x [tokens, hidden] -> fp32 [tokens, hidden]."""
        ...


class PackedExperts:
    """INT4 experts times int8 activations, by the Numba kernels."""

    def __init__(self, experts: kernels.Experts) -> None:
        self.experts = experts

    @property
    def expert_bytes(self) -> int:
        return sum(matrix.blocks[0].nbytes for matrix in self.experts)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        rows = x.float().numpy(force=True)
        out = kernels.moe(self.experts, rows, topk_ids.numpy(force=True), topk_weights.numpy(force=True))
        return torch.from_numpy(out).to(x.device)


ObserveExpert = Callable[[int, Tensor, Tensor, Tensor], None]


def unobserved(expert: int, weights: Tensor, inner: Tensor, outputs: Tensor) -> None:
    """The default `observe`."""


class ExactExperts:
    """Experts in full precision by torch, one at a time: the path that others are checked against, and bf16 models'."""

    def __init__(self, expert: Callable[[int], tuple[Tensor, Tensor, Tensor]], expert_bytes: int) -> None:
        """`expert(i)` returns gate, up [intermediate, hidden] and down [hidden, intermediate] in the model's dtype."""
        self.expert = expert
        self.expert_bytes = expert_bytes
        # Told of an expert applied: weights [n] of its tokens, inner [n, intermediate] and outputs fp32 [n, hidden].
        self.observe: ObserveExpert = unobserved

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in topk_ids.unique().tolist():
            rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up, down = self.expert(expert)
            inputs = x[rows].to(gate.dtype)
            inner = torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
            outputs, weights = (inner @ down.T).float(), topk_weights[rows, slots]
            self.observe(expert, weights, inner, outputs)
            out.index_add_(0, rows, outputs * weights[:, None])
        return out


def load_experts(checkpoint: Checkpoint, layer: int, *, exact: bool, dtype: torch.dtype, threads: int) -> LayerExperts:
    """The experts of one layer, INT4 ones reordered without loss for the kernels unless `exact`."""
    config = checkpoint.config
    count = config.n_routed_experts
    if checkpoint.expert_format(layer) != "int4_g32":
        return ExactExperts(lambda i: _dense(checkpoint.expert(layer, i), dtype), config.expert_bytes(16))
    experts = kernels.Experts(
        int4_g32.empty(count, 2 * config.moe_intermediate_size, config.hidden_size),
        int4_g32.empty(count, config.hidden_size, config.moe_intermediate_size),
    )

    def pack(index: int) -> None:
        gate, up, down = (_released(weight) for weight in checkpoint.expert(layer, index))
        both = [kernels.interleave(g, u) for g, u in zip(gate, up, strict=True)]
        int4_g32.pack(both[0], both[1], experts.gate_up.blocks[index])
        int4_g32.pack(*down, experts.down.blocks[index])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(pack, range(count)))
    packed = PackedExperts(experts)
    if not exact:
        return packed
    return ExactExperts(
        lambda i: _decoded(experts, i, config.hidden_size, config.moe_intermediate_size, dtype), packed.expert_bytes
    )


def _released(weight: Int4Weight | Tensor) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(weight, Int4Weight)
    return weight.packed, weight.scales


def _dense(expert: Expert, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, down = expert
    assert isinstance(gate, Tensor) and isinstance(up, Tensor) and isinstance(down, Tensor)
    return gate.to(dtype), up.to(dtype), down.to(dtype)


def _decoded(
    experts: kernels.Experts, index: int, hidden: int, intermediate: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    gate_up = int4_g32.decode(experts.gate_up.blocks[index], hidden).reshape(-1, 2, 16, hidden)
    gate, up = (np.ascontiguousarray(gate_up[:, part]).reshape(-1, hidden) for part in (0, 1))
    down = int4_g32.decode(experts.down.blocks[index], intermediate)
    return torch.from_numpy(gate).to(dtype), torch.from_numpy(up).to(dtype), torch.from_numpy(down).to(dtype)
