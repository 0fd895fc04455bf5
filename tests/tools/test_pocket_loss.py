"""The fused head against torch's cross entropy."""

import pytest
import torch
import torch.nn.functional as F
from pocket.loss import CHUNK, HeadLoss


@pytest.mark.parametrize("rows", [1, CHUNK, 2 * CHUNK + 3])
def test_loss_gradient_and_best_guesses(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    h = torch.randn(rows, 16, generator=generator).requires_grad_()
    head = torch.randn(50, 16, generator=generator).requires_grad_()
    targets = torch.randint(50, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    loss, first = HeadLoss.apply(h, head, targets, weights)
    logits = h @ head.T
    expected = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert int(first) == int((logits.argmax(1) == targets).sum())
    found = torch.autograd.grad(2 * loss, (h, head))
    for one, other in zip(found, torch.autograd.grad(2 * expected, (h, head)), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_nothing_to_predict() -> None:
    loss, first = HeadLoss.apply(torch.ones(0, 4), torch.ones(9, 4), torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert loss.item() == 0 and int(first) == 0
