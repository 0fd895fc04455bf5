"""INT4 rounding: what is stored is what is meant, and outputs come out closer than by plain rounding."""

import pytest
import torch
from torch import Tensor

from hybrid.demo import int4


def problem(batch: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weights, and inputs [batch, tokens, columns] that are correlated and unequal in size."""
    random = torch.Generator().manual_seed(rows)
    mix = torch.randn(columns, columns, generator=random) * torch.logspace(-1, 0.5, columns)
    x = torch.randn(batch, 4 * columns, columns, generator=random) @ mix.T / columns**0.5
    return torch.randn(batch, rows, columns, generator=random), x


def nearest(weight: Tensor) -> Tensor:
    """Plain rounding with scale = largest / 7."""
    groups = weight.unflatten(-1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)


@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 40, 32), (1, 64, 96), (3, 24, 128)])
def test_outputs_are_closer_than_by_plain_rounding(batch: int, rows: int, columns: int) -> None:
    weight, x = problem(batch, rows, columns)
    codes, scales = int4.quantize(weight, x.transpose(1, 2) @ x / x.shape[1])
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and codes.min() >= -8 and codes.max() <= 7
    assert scales.dtype == torch.bfloat16 and scales.shape == (batch, rows, columns // 32) and (scales > 0).all()

    def error(rounded: Tensor) -> float:
        return float((x @ (rounded - weight).transpose(1, 2)).pow(2).mean())

    assert error(int4.dequantize(codes, scales)) < 0.8 * error(nearest(weight))


def test_codes_of_a_row_do_not_depend_on_the_others() -> None:
    """Twin experts share the codes of their neurons, in another order."""
    weight, x = problem(1, 48, 64)
    moments = x.transpose(1, 2) @ x / x.shape[1]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    codes, scales = int4.quantize(weight, moments)
    permuted_codes, permuted_scales = int4.quantize(weight[:, order], moments)
    assert torch.equal(codes[:, order], permuted_codes) and torch.equal(scales[:, order], permuted_scales)


def test_weights_on_the_grid_are_kept() -> None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (1, 16, 64), generator=random, dtype=torch.int8)
    codes[..., ::32] = 7
    scales = torch.rand(1, 16, 2, generator=random).add(0.5).bfloat16()
    weight = int4.dequantize(codes, scales)
    again = int4.dequantize(*int4.quantize(weight, torch.eye(64)[None]))
    assert (again - weight).abs().max() / weight.abs().max() < 1e-2


def test_zero_weights_and_unused_inputs() -> None:
    weight, _ = problem(1, 8, 64)
    weight[0, 0] = 0
    moments = torch.eye(64)[None].clone()
    moments[0, 5] = 0
    rounded = int4.dequantize(*int4.quantize(weight, moments))
    assert rounded.isfinite().all() and rounded[0, 0].eq(0).all()


def test_search_is_never_worse_than_the_largest_magnitude() -> None:
    weight, _ = problem(1, 200, 32)
    importance = torch.rand(1, 1, 32, generator=torch.Generator().manual_seed(0))
    scale = int4.search_scale(weight, importance).float()[..., None]
    found = ((weight / scale).round().clamp(-8, 7) * scale - weight).pow(2) * importance
    plain = (nearest(weight) - weight).pow(2) * importance
    assert (found.sum(-1) <= plain.sum(-1)).all() and found.sum() < 0.9 * plain.sum()
