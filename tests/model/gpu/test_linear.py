"""Resident matrices on a card against their decoded weights."""

import numpy as np
import pytest
import torch

from hybrid.model.gpu import Card, check
from hybrid.model.gpu.linear import multiply
from hybrid.model.gpu.matrix import join, upload
from quant import linear

SHAPES = [(32, 32, 1), (96, 160, 3), (100, 64, 17), (300, 96, 70)]  # rows, columns, tokens


@pytest.mark.parametrize("name", ["int8_g32", "int4_g32"])
@pytest.mark.parametrize(("rows", "columns", "tokens"), SHAPES)
def test_multiply(card: Card, name: str, rows: int, columns: int, tokens: int) -> None:
    assert check.linear_error(card, name, rows, columns, tokens) < check.CLOSE


@pytest.mark.parametrize("name", ["int8_g32", "int4_g32"])
def test_joined_matrices_give_both_products(card: Card, name: str) -> None:
    rng = np.random.default_rng(0)
    parts = [upload(linear.encode(name, rng.standard_normal((n, 96), np.float32)), card.device) for n in (64, 40)]
    x = torch.from_numpy(rng.standard_normal((2, 96), np.float32)).to(card.device)
    apart = torch.cat([multiply(card.launch, part, x) for part in parts], dim=1)
    torch.testing.assert_close(multiply(card.launch, join(parts), x), apart)
    assert linear.can_join(parts) and not linear.can_join(parts[::-1])


def test_a_row_does_not_depend_on_its_neighbours(card: Card) -> None:
    """Prefill and decode agree: a row comes out the same alone and among many, to rounding of sums."""
    rng = np.random.default_rng(0)
    matrix = upload(linear.encode("int8_g32", rng.standard_normal((64, 128), np.float32)), card.device)
    x = torch.from_numpy(rng.standard_normal((40, 128), np.float32)).to(card.device)
    together = multiply(card.launch, matrix, x)
    alone = torch.cat([multiply(card.launch, matrix, row[None]) for row in x[:3]])
    torch.testing.assert_close(together[:3], alone, rtol=1e-5, atol=1e-4)
