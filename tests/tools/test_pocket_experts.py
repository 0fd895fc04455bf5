"""Routed experts in one sorted launch against one token and one expert at a time."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pocket.experts import STEP, Dispatch, RoutedExperts
from torch import Tensor

HIDDEN, WIDTH, EXPERTS, TOP_K = 6, 4, 5, 2


def one_by_one(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for token, chosen, scale in zip(x, ids.tolist(), weights, strict=True):
        parts = [
            scale[i] * (down[expert] @ (F.silu(gate_up[expert, 0] @ token) * (gate_up[expert, 1] @ token)))
            for i, expert in enumerate(chosen)
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.integers(1, EXPERTS), st.integers(0, 99))
def test_every_token_reaches_its_experts(tokens: int, used: int, seed: int) -> None:
    """Also when some experts get nothing, and one gets everything."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = draw(tokens, HIDDEN), draw(tokens, TOP_K), draw(EXPERTS, 2, WIDTH, HIDDEN), draw(EXPERTS, HIDDEN, WIDTH)
    x, weights, gate_up, down = inputs
    ids = torch.randint(used, (tokens, TOP_K), generator=generator)
    out = RoutedExperts.apply(x, weights, gate_up, down, Dispatch.of(ids, EXPERTS))
    expected = one_by_one(x, ids, weights, gate_up, down)
    assert torch.allclose(out, expected)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(out, inputs, grad)
    for one, other in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.allclose(one, other, atol=1e-6), "the weights' gradient is summed in fp32"


def test_rows_lie_with_their_expert() -> None:
    ids = torch.tensor([[3, 0], [3, 1], [0, 3]])
    dispatch = Dispatch.of(ids, 4)
    assert dispatch.ends == (STEP, 2 * STEP, 2 * STEP, 3 * STEP)
    for token, (chosen, slots) in enumerate(zip(ids.tolist(), dispatch.slots.tolist(), strict=True)):
        for expert, slot in zip(chosen, slots, strict=True):
            span = dispatch.spans()[expert]
            assert span.start <= slot < span.stop and dispatch.token[slot] == token
