"""Attention of whole documents: each is cut out of its row, and documents of like length are computed together.

A row of training holds several documents that must not see each other. Scoring the row and masking most of it away
would be three times the work; cut out and padded to a multiple of 32, a document needs nothing but the causal mask,
because what pads it lies in its future.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

STEP = 32  # lengths are rounded up to a multiple of this


@dataclass(frozen=True)
class Bucket:
    """Documents of one padded length."""

    length: int
    rows: Tensor  # int64 [documents * heads * length]: which row of [tokens * heads] stands there
    real: Tensor  # bool [documents * heads, length, 1]: not padding


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch lie once its documents are cut out and padded."""

    heads: int
    buckets: tuple[Bucket, ...]
    place: Tensor  # int64 [tokens * heads]: position of each row in all buckets, one after the other

    @classmethod
    def of(cls, lengths: Sequence[int], heads: int) -> "Layout":
        """For documents of these lengths that lie one after the other."""
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes
        padded = (sizes + STEP - 1) // STEP * STEP
        place = torch.empty(int(sizes.sum()) * heads, dtype=torch.int64)
        buckets, position = [], 0
        for length in padded.unique().tolist():
            chosen = padded == length
            rows, real = _rows(starts[chosen], sizes[chosen], heads, length)
            flat = rows.flatten()
            at = torch.arange(position, position + len(flat))
            place[flat[real.flatten()]] = at[real.flatten()]
            buckets.append(Bucket(length, flat, real.reshape(-1, length, 1)))
            position += len(flat)
        return cls(heads, tuple(buckets), place)


def _rows(starts: Tensor, sizes: Tensor, heads: int, length: int) -> tuple[Tensor, Tensor]:
    """[documents, heads, length] each: rows of [tokens * heads], the last one repeated as padding, and what is real."""
    steps = torch.arange(length)
    tokens = starts[:, None] + torch.minimum(steps, sizes[:, None] - 1)
    rows = tokens[:, None] * heads + torch.arange(heads)[:, None]
    return rows, (steps < sizes[:, None])[:, None].expand_as(rows)


class DocumentAttention(torch.autograd.Function):
    """Causal softmax attention inside each document.

    q, k [tokens, heads, width], v [tokens, heads, v_width] -> [tokens, heads, v_width], and the largest score of each
    head before the softmax, fp32 [heads]. Scores are q . k; any scale is in q already.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        kept, outputs, largest = [], [], []
        for bucket in layout.buckets:
            parts = [_cut(x, bucket) for x in (q, k, v)]
            scores = torch.bmm(parts[0], parts[1].transpose(1, 2))
            scores.add_(_future(bucket.length, scores.dtype))
            largest.append(scores.amax(-1).view(-1, layout.heads, bucket.length).amax((0, 2)))
            weights = torch.softmax(scores, dim=-1)
            outputs.append(torch.bmm(weights, parts[2]).flatten(0, 1))
            kept += [*parts, weights]
        ctx.save_for_backward(*kept)
        ctx.layout = layout
        top = torch.stack(largest).amax(0).float()
        ctx.mark_non_differentiable(top)
        return _joined(outputs, layout), top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        layout, kept = ctx.layout, iter(ctx.saved_tensors)
        grads: tuple[list[Tensor], ...] = ([], [], [])
        for bucket, q, k, v, weights in zip(layout.buckets, kept, kept, kept, kept, strict=True):
            out = _cut(grad, bucket) * bucket.real  # what nobody reads has no gradient
            by_weight = torch.bmm(out, v.transpose(1, 2))
            by_score = torch.ops.aten._softmax_backward_data(by_weight, weights, -1, weights.dtype)
            parts = (torch.bmm(by_score, k), torch.bmm(by_score.transpose(1, 2), q), torch.bmm(weights.mT, out))
            for found, part in zip(grads, parts, strict=True):
                found.append(part.flatten(0, 1))
        q_grad, k_grad, v_grad = (_joined(found, layout) for found in grads)
        return q_grad, k_grad, v_grad, None


def _cut(x: Tensor, bucket: Bucket) -> Tensor:
    """[tokens, heads, width] -> [documents * heads, length, width]"""
    return x.flatten(0, 1).index_select(0, bucket.rows).view(-1, bucket.length, x.shape[2])


def _joined(parts: list[Tensor], layout: Layout) -> Tensor:
    """The inverse of `_cut` over all buckets."""
    return torch.cat(parts).index_select(0, layout.place).unflatten(0, (-1, layout.heads))


def _future(length: int, dtype: torch.dtype) -> Tensor:
    return torch.full((length, length), -torch.inf, dtype=dtype).triu_(1)
