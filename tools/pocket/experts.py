"""Routed experts: every token visits its own, and no token is ever dropped.

Rows are sorted by expert and each expert multiplies its own, rounded up to a multiple of 32 rows: matrix products are
compiled once per shape, and few shapes keep that rare.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

STEP = 32


@dataclass(frozen=True)
class Dispatch:
    """Which row of the sorted, padded input belongs to whom."""

    token: Tensor  # int64 [padded rows]; 0 for padding
    slots: Tensor  # int64 [tokens, top_k]: the row of each choice
    ends: tuple[int, ...]  # per expert, of its rows

    @classmethod
    def of(cls, topk_ids: Tensor, experts: int) -> "Dispatch":
        """For topk_ids int64 [tokens, top_k]."""
        flat, top_k = topk_ids.flatten(), topk_ids.shape[1]
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=experts)
        padded = (counts + STEP - 1) // STEP * STEP
        ends = padded.cumsum(0)
        shift = (ends - padded) - (counts.cumsum(0) - counts)
        at = torch.arange(len(flat)) + shift[flat[order]]
        token = torch.zeros(int(ends[-1]), dtype=torch.int64)
        token[at] = order // top_k
        slots = torch.empty_like(flat)
        slots[order] = at
        return cls(token, slots.view_as(topk_ids), tuple(ends.tolist()))

    def spans(self) -> list[slice]:
        """Per expert, its rows."""
        return [slice(start, end) for start, end in zip((0, *self.ends), self.ends, strict=False)]


class RoutedExperts(torch.autograd.Function):
    """x [tokens, hidden] -> [tokens, hidden]: the sum over chosen experts of weight * down(silu(gate x) * up x).

    topk_weights [tokens, top_k] of any float type; gate_up [experts, 2, width, hidden]; down [experts, hidden, width].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, dispatch: Dispatch) -> Tensor:
        rows = x.index_select(0, dispatch.token)
        hidden = _each(rows, gate_up.flatten(1, 2).mT, dispatch)
        weights = torch.zeros(len(rows), dtype=x.dtype)
        weights[dispatch.slots.flatten()] = topk_weights.flatten().to(x.dtype)  # padding weighs nothing
        gate, up = hidden.chunk(2, dim=1)
        outputs = _each(F.silu(gate).mul_(up).mul_(weights[:, None]), down.mT, dispatch)
        ctx.save_for_backward(rows, hidden, weights, gate_up, down)
        ctx.dispatch, ctx.weights_dtype = dispatch, topk_weights.dtype
        return _gathered(outputs, dispatch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        rows, hidden, weights, gate_up, down = ctx.saved_tensors
        dispatch: Dispatch = ctx.dispatch
        gate, up = hidden.chunk(2, dim=1)
        silu = F.silu(gate)
        act = silu * up
        out = grad.index_select(0, dispatch.token)
        by_act = _each(out, down, dispatch)
        by_weight = (by_act * act).sum(1, dtype=torch.float32)
        by_down = _outer(out, act.mul_(weights[:, None]), dispatch)
        by_act.mul_(weights[:, None])
        by_gate = torch.ops.aten.silu_backward(by_act * up, gate)
        by_hidden = torch.cat((by_gate, by_act.mul_(silu)), dim=1)
        by_gate_up = _outer(by_hidden, rows, dispatch).view_as(gate_up)
        by_x = _gathered(_each(by_hidden, gate_up.flatten(1, 2), dispatch), dispatch)
        by_topk = by_weight[dispatch.slots.flatten()].view_as(dispatch.slots).to(ctx.weights_dtype)
        return by_x, by_topk, by_gate_up, by_down, None


def _each(rows: Tensor, matrices: Tensor, dispatch: Dispatch) -> Tensor:
    """rows [padded, in] times matrices [experts, in, out], to each its own -> [padded, out]"""
    out = rows.new_empty(len(rows), matrices.shape[2])
    for span, matrix in zip(dispatch.spans(), matrices, strict=True):
        torch.mm(rows[span], matrix, out=out[span])
    return out


def _outer(left: Tensor, right: Tensor, dispatch: Dispatch) -> Tensor:
    """[padded, a] and [padded, b] -> [experts, a, b]: left^T right over each expert's rows."""
    out = left.new_empty(len(dispatch.ends), left.shape[1], right.shape[1])
    for expert, span in enumerate(dispatch.spans()):
        torch.mm(left[span].T, right[span], out=out[expert])
    return out


def _gathered(rows: Tensor, dispatch: Dispatch) -> Tensor:
    """[padded, width] -> [tokens, width]: the sum of each token's rows."""
    return F.embedding_bag(dispatch.slots, rows, mode="sum")
