"""The small layers: normalisation, the gated MLP, and how weights reach them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Callable[[str], Tensor]  # a tensor's normalised name -> the tensor, on its device, in the model's dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32, back to x's type, times weight; x [..., width]."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@dataclass(frozen=True)
class GatedMLP:
    """down(silu(gate x) * up x), without biases: the dense layers and the shared expert."""

    gate: Tensor  # [intermediate, hidden]
    up: Tensor
    down: Tensor  # [hidden, intermediate]

    @classmethod
    def load(cls, linear: Weights, prefix: str) -> "GatedMLP":
        return cls(linear(f"{prefix}.gate_proj"), linear(f"{prefix}.up_proj"), linear(f"{prefix}.down_proj"))

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)
