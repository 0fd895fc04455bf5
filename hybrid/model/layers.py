"""The small layers: normalisation, linears, the gated MLP, and how weights reach them."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.checkpoint import Checkpoint
from hybrid.checkpoint.hf import Int4Weight, Int8Weight
from quant import aligned, bf16, linear

FEW = 4  # tokens up to which our product of a bf16 matrix is faster than torch's, which is made for many


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32, back to x's type, times weight; x [..., width]."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _bits(weight: Tensor) -> np.ndarray | None:
    """A copy of a bf16 matrix for our kernels, int16 bits from a page on; None where they do not apply."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not bf16.supports(*weight.shape[-2:]):
        return None
    stored = weight.contiguous().view(torch.int16).numpy()
    bits = aligned.empty((stored.nbytes,)).view(np.int16).reshape(stored.shape)
    bits[:] = stored
    return bits


class Linear:
    """x [tokens, in] -> [tokens, out], with a bias if the checkpoint has one; few tokens go to our own kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bits = _bits(weight)
        self.weight = weight if self.bits is None else torch.from_numpy(self.bits).view(torch.bfloat16)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is None or len(x) > FEW:
            return F.linear(x, self.weight, self.bias)
        y = torch.from_numpy(bf16.multiply(self.bits, x.float().numpy())).to(x.dtype)
        return y if self.bias is None else y + self.bias


class PackedLinear(Linear):
    """The same over a matrix kept in INT4 or int8: inputs are rounded to int8, the kernels do the rest."""

    def __init__(self, matrix: linear.Matrix, bias: Tensor | None = None) -> None:
        self.matrix = matrix
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch.from_numpy(linear.multiply(self.matrix, x.float().contiguous().numpy())).to(x.dtype)
        return y if self.bias is None else y + self.bias


class HeadLinear:
    """A matrix of its own for every head: x [tokens, heads, in] -> [tokens, heads, out]."""

    def __init__(self, weight: Tensor) -> None:
        """weight [heads, out, in]"""
        self.bits = _bits(weight)
        self.weight = weight if self.bits is None else torch.from_numpy(self.bits).view(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is None or len(x) > FEW:
            return torch.bmm(x.transpose(0, 1), self.weight.transpose(1, 2)).transpose(0, 1)
        return torch.from_numpy(bf16.multiply_heads(self.bits, x.float().contiguous().numpy())).to(x.dtype)


class Weights:
    """The resident weights of a checkpoint, on their device and in their dtype."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, exact: bool = False
    ) -> None:
        """`exact` linears multiply full-precision inputs. Those stored in INT4 or int8 are then decoded, as they are in
        any dtype but bf16 and on any device but the CPU; elsewhere they stay packed."""
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.keeps_packed = device.type == "cpu" and dtype == torch.bfloat16 and not exact
        self.matrix_bytes = 0  # of all matrices asked for: what every step reads

    def stored(self, name: str) -> Tensor:
        """A tensor in the precision it is stored in."""
        return self.checkpoint.tensor(name).to(self.device)

    def tensor(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name).to(self.device, self.dtype)

    def matrix(self, prefix: str) -> Tensor:
        """[out, in] of a linear, decoded if it is stored in fewer bits."""
        matrix = self.checkpoint.linear(prefix, self.dtype).to(self.device, self.dtype)
        self.matrix_bytes += matrix.nbytes
        return matrix

    def linear(self, prefix: str) -> Linear:
        name = f"{prefix}.bias"
        bias = self.tensor(name) if self.checkpoint.has(name) else None
        packed = _packed(self.checkpoint.matrix(prefix)) if self.keeps_packed else None
        if packed is None:
            return Linear(self.matrix(prefix), bias)
        self.matrix_bytes += packed.nbytes
        return PackedLinear(packed, bias)


def _packed(weight: Int4Weight | Int8Weight | Tensor) -> linear.Matrix | None:
    """A stored matrix in the layout its kernel reads; None for one that is not INT4 or int8."""
    if isinstance(weight, Int4Weight):
        return linear.pack_int4(weight.packed, weight.scales)
    return linear.pack_int8(weight.codes, weight.scales) if isinstance(weight, Int8Weight) else None


@dataclass(frozen=True)
class GatedMLP:
    """down(silu(gate x) * up x): the dense layers and the shared expert."""

    gate: Linear  # [intermediate, hidden]
    up: Linear
    down: Linear  # [hidden, intermediate]

    @classmethod
    def load(cls, weights: Weights, prefix: str) -> "GatedMLP":
        return cls(*(weights.linear(f"{prefix}.{name}_proj") for name in ("gate", "up", "down")))

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        return self.down.forward(F.silu(self.gate.forward(x)) * self.up.forward(x))
