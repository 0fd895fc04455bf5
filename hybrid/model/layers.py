"""The small layers: normalisation, linears, the gated MLP, and how weights reach them."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.checkpoint import Checkpoint
from hybrid.checkpoint.hf import Int4Weight, Int8Weight
from hybrid.model.gpu import Card
from hybrid.model.gpu.matrix import CardMatrix, join, upload
from quant import aligned, bf16, linear
from quant.cpu import MULTIPLIES_BF16

FEW = 4 if MULTIPLIES_BF16 else 128  # tokens up to which our product of a bf16 matrix is faster than torch's
WIDE = 16 << 20  # bytes of fp32 that a piece of a bf16 matrix becomes
TILE = 1024  # tokens of a long chunk whose widest intermediate values exist at the same time


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


def widened(x: Tensor, weight: Tensor) -> Tensor:
    """x [tokens, in] times bf16 weight [out, in] in fp32, -> [tokens, out] in x's type; for CPUs that multiply no bf16.

    A piece of the matrix at a time is converted, and stays in the cache.
    """
    wide, y = x.float(), x.new_empty(len(x), len(weight))
    rows = max(1, WIDE // (4 * weight.shape[1]))
    for start in range(0, len(weight), rows):
        y[:, start : start + rows] = wide @ weight[start : start + rows].float().T
    return y


class Linear:
    """x [tokens, in] -> [tokens, out], with a bias if the checkpoint has one; few tokens go to our own kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bits = _bits(weight)
        self.weight = weight if self.bits is None else torch.from_numpy(self.bits).view(torch.bfloat16)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is None or (MULTIPLIES_BF16 and len(x) > FEW):
            return F.linear(x, self.weight, self.bias)
        if len(x) > FEW:
            y = widened(x, self.weight)
        else:
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


class CardLinear(Linear):
    """The same on a card, where inputs are rounded to fp16 and weights not at all."""

    def __init__(self, card: Card, matrix: CardMatrix, bias: Tensor | None = None) -> None:
        from hybrid.model.gpu.linear import multiply  # needs Triton, as nothing without a card does

        self.card = card
        self.matrix = matrix
        self.bias = bias
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(self.card.launch, self.matrix, x)
        return y if self.bias is None else y + self.bias


class Beside(Linear):
    """Linears of the same input that cannot become one matrix; their outputs lie side by side."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part.forward(x) for part in self.parts], dim=-1)


def beside(parts: Sequence[Linear]) -> Linear:
    """Linears of the same input as one whose outputs lie side by side: one launch, where it can be."""
    packed = [part.matrix for part in parts if isinstance(part, PackedLinear)]
    if len(packed) == len(parts) and linear.can_join(packed):
        return PackedLinear(linear.join(packed), _biases(parts, [matrix.rows for matrix in packed]))
    on_card = [part for part in parts if isinstance(part, CardLinear)]
    if len(on_card) == len(parts) and linear.can_join([part.matrix for part in on_card]):
        joined, biases = join([part.matrix for part in on_card]), _biases(parts, [part.matrix.rows for part in on_card])
        return CardLinear(on_card[0].card, joined, biases)
    if not packed and not on_card:
        weights = [part.weight for part in parts]
        return Linear(torch.cat(weights), _biases(parts, [len(weight) for weight in weights]))
    return Beside(parts)


def _biases(parts: Sequence[Linear], rows: Sequence[int]) -> Tensor | None:
    """One after another, zeros for linears that have none."""
    known = [part.bias for part in parts if part.bias is not None]
    if not known:
        return None
    each = zip(parts, rows, strict=True)
    return torch.cat([known[0].new_zeros(n) if part.bias is None else part.bias for part, n in each])


class HeadLinear:
    """A matrix of its own for every head: x [tokens, heads, in] -> [tokens, heads, out]."""

    def __init__(self, weight: Tensor) -> None:
        """weight [heads, out, in]"""
        self.rows = weight.shape[1]
        self.ours = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        if self.ours:
            self.blocks = bf16.pack_heads(weight.contiguous().view(torch.int16).numpy())
            self.weight = torch.from_numpy(self.blocks).view(torch.bfloat16)  # [heads, blocks, in, rows of a block]
        else:
            self.weight = weight.transpose(1, 2).contiguous()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if self.ours and (len(x) <= FEW or not MULTIPLIES_BF16):
            y = bf16.multiply_heads(self.blocks, x.float().contiguous().numpy())
            return torch.from_numpy(y)[:, :, : self.rows].to(x.dtype)
        blocks = x.transpose(0, 1)[:, None] @ self.weight  # [heads, blocks, tokens, rows of a block]
        return blocks.permute(2, 0, 1, 3).flatten(2)[:, :, : self.rows]


class Weights:
    """The resident weights of a checkpoint, on their device and in their dtype."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        exact: bool = False,
        card: Card | None = None,
    ) -> None:
        """`exact` linears multiply full-precision inputs. Those stored in INT4 or int8 are then decoded, as they are in
        any dtype but bf16 and on any device that is neither the CPU nor `card`; elsewhere they stay packed."""
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.card = card
        ours = device.type == "cpu" or card is not None
        self.keeps_packed = ours and dtype == torch.bfloat16 and not exact
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
        if self.card is None:
            return PackedLinear(packed, bias)
        return CardLinear(self.card, upload(packed, self.device), bias)


def _packed(weight: Int4Weight | Int8Weight | Tensor) -> linear.Matrix | None:
    """A stored matrix in the layout its kernel reads; None for one that is not INT4 or int8."""
    if isinstance(weight, Int4Weight):
        return linear.pack_int4(weight.packed, weight.scales)
    return linear.pack_int8(weight.codes, weight.scales) if isinstance(weight, Int8Weight) else None


class GatedMLP:
    """down(silu(gate x) * up x): the dense layers and the shared expert."""

    def __init__(self, gate: Linear, up: Linear, down: Linear) -> None:
        """gate, up [intermediate, hidden]; down [hidden, intermediate]"""
        self.gate_up = beside((gate, up))
        self.down = down

    @classmethod
    def load(cls, weights: Weights, prefix: str) -> "GatedMLP":
        return cls(*(weights.linear(f"{prefix}.{name}_proj") for name in ("gate", "up", "down")))

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        tiles = [self._tile(part) for part in x.split(TILE)]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles)

    def _tile(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up.forward(x).chunk(2, dim=-1)
        return self.down.forward(F.silu(gate) * up)
