"""Folding the norms away and turning the residual stream: the same function in a basis that quantizes better.

RMSNorm does not care about rotations once its weight is part of the next matrix, so the residual stream may be
multiplied by one orthogonal matrix Q, and every weight that reads or writes it accordingly (QuaRot, Ashkboos et al.
2024, arXiv:2404.00456). In the new basis no channel stands out, and a group of 32 weights no longer takes its scale
from one of them.
"""

import math

import torch
from torch import Tensor

from hybrid.demo.llama import LlamaLayer


def hartley(size: int) -> Tensor:
    """fp32 [size, size], orthogonal: the discrete Hartley transform, its rows multiplied by a fixed choice of signs."""
    i = torch.arange(size, dtype=torch.float64)
    angles = (i[:, None] * i % size) * (2 * math.pi / size)
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (signs * (angles.cos() + angles.sin()) / math.sqrt(size)).float()


def rotate_layer(layer: LlamaLayer, q: Tensor) -> LlamaLayer:
    """The layer for a residual stream h @ q instead of h, with norm weights 1."""
    ones = torch.ones_like(layer.input_norm)
    reads = {name: (getattr(layer, name) * layer.input_norm) @ q for name in ("q", "k", "v")}
    reads |= {name: (getattr(layer, name) * layer.post_norm) @ q for name in ("gate", "up")}
    writes = {name: q.T @ getattr(layer, name) for name in ("o", "down")}
    return layer._replace(input_norm=ones, post_norm=ones, **reads, **writes)
