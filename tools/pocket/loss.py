"""The head and its cross entropy in one pass: a chunk of logits is made, used for the gradient and forgotten."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 256  # rows whose fp32 logits fit a core's cache


class HeadLoss(torch.autograd.Function):
    """h [rows, hidden], head [vocab, hidden] -> the weighted sum of -log p(target), and how many targets came first.

    targets int64 [rows], weights fp32 [rows]. The gradient is computed with the loss, in the type of h.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        by_h, by_head = torch.empty_like(h), torch.zeros(head.shape)
        loss, first = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for start in range(0, len(h), CHUNK):
            rows = slice(start, start + CHUNK)
            by_logits, part, right = _chunk((h[rows] @ head.T).float(), targets[rows], weights[rows])
            by_logits = by_logits.to(h.dtype)
            torch.mm(by_logits, head, out=by_h[rows])
            by_head += by_logits.T @ h[rows]
            loss += part
            first += right
        ctx.save_for_backward(by_h, by_head.to(head.dtype))
        ctx.mark_non_differentiable(first)
        return loss, first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_h, by_head = ctx.saved_tensors
        return by_h * grad, by_head * grad, None, None


def _chunk(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 logits [rows, vocab], overwritten -> their gradient, the loss, the number of best targets."""
    index = targets[:, None]
    logits -= logits.amax(1, keepdim=True)
    target = logits.gather(1, index)
    first = (target == 0).sum()
    probabilities = logits.exp_()
    total = probabilities.sum(1, keepdim=True)
    loss = ((total.log() - target).squeeze(1) * weights).sum()
    probabilities *= weights[:, None] / total
    return probabilities.scatter_add_(1, index, -weights[:, None]), loss, first
