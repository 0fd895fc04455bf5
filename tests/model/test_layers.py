"""Products with bf16 matrices: the same by our kernels, by torch's, and by what stands in for those."""

import pytest
import torch
from torch import Tensor

from hybrid.model import layers
from hybrid.model.layers import HeadLinear, Linear


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.fixture(params=[True, False])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that multiplies bf16, and one that does not; pieces of few rows."""
    monkeypatch.setattr(layers, "MULTIPLIES_BF16", request.param)
    monkeypatch.setattr(layers, "FEW", 4)
    monkeypatch.setattr(layers, "WIDE", 4 * 64 * 10)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("tokens", [1, 4, 5, 70])
@pytest.mark.parametrize("rows", [7, 10, 96])
def test_a_linear_is_a_product_and_a_bias(tokens: int, rows: int) -> None:
    weight, bias, x = random(rows, 64), random(rows), random(tokens, 64)
    expected = x.float() @ weight.float().T
    for shift in (None, bias):
        found = Linear(weight, shift).forward(x)
        wanted = expected if shift is None else expected + shift.float()
        assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), wanted, rtol=0.02, atol=0.05)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("tokens", [1, 4, 5, 70])
@pytest.mark.parametrize("rows", [16, 64, 100])
def test_a_matrix_of_its_own_for_every_head(tokens: int, rows: int) -> None:
    weight, x = random(3, rows, 32), random(tokens, 3, 32)
    expected = torch.einsum("thi,hoi->tho", x.float(), weight.float())
    found = HeadLinear(weight).forward(x)
    assert found.shape == (tokens, 3, rows) and torch.allclose(found.float(), expected, rtol=0.02, atol=0.05)


def test_widened_is_fp32_arithmetic() -> None:
    weight, x = random(96, 64), random(9, 64)
    exact = (x.double() @ weight.double().T).bfloat16()
    assert (layers.widened(x, weight) == exact).float().mean() > 0.99
