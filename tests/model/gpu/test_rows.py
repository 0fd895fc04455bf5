"""Rows before and between the products: rotation, rounding to fp16, SwiGLU."""

import numpy as np
import pytest
import torch

from hybrid.model.gpu import Card
from hybrid.model.gpu.encode import combine, encode, join
from quant.rotation import rotate, signs
from quant.swiglu import swiglu


def decoded(halves) -> np.ndarray:
    return (halves.values.float() * halves.scales[:, None]).cpu().numpy()


@pytest.mark.parametrize("columns", [32, 96, 576, 2048])
def test_rotation_is_that_of_the_weights(card: Card, columns: int) -> None:
    rng = np.random.default_rng(columns)
    x, sign = rng.standard_normal((3, columns), np.float32), signs(1, 2, "down", columns).astype(np.float32)
    found = decoded(encode(card.launch, *(torch.from_numpy(array).to(card.device) for array in (x, sign))))
    np.testing.assert_allclose(found, rotate(x, sign), rtol=2**-10, atol=1e-6)


def test_bf16_rows_survive_exactly_at_any_scale(card: Card) -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    x *= torch.tensor([[1e-30], [1.0], [1e30], [0.0]])
    found = encode(card.launch, x.to(card.device))
    np.testing.assert_array_equal(decoded(found), x.float().numpy())


def test_what_is_not_a_number_stays_so(card: Card) -> None:
    x = torch.ones(2, 64)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    found = decoded(encode(card.launch, x.to(card.device)))
    assert np.isnan(found[0, 3]) and not np.isfinite(found[1, 5]) and np.isfinite(found[1, :5]).all()


def test_join_is_swiglu_of_the_sum_of_parts(card: Card) -> None:
    raw = np.random.default_rng(0).standard_normal((3, 2, 256), np.float32)
    whole = raw.sum(1)[:, :192].reshape(3, -1, 2, 16)
    expected = swiglu(whole[:, :, 0].reshape(3, -1), whole[:, :, 1].reshape(3, -1))
    found = decoded(join(card.launch, torch.from_numpy(raw).to(card.device), 96, None))
    np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-6)


def test_combine_weighs_and_adds(card: Card) -> None:
    rng = np.random.default_rng(0)
    raw, weights = rng.standard_normal((6, 2, 1100), np.float32), rng.random((2, 3), np.float32)
    places = rng.permutation(6).reshape(2, 3)
    y = torch.empty(2, 1090, device=card.device)
    combine(
        card.launch,
        *(torch.from_numpy(a).to(card.device) if a is not None else y for a in (raw, None, places, weights)),
    )
    expected = np.einsum("tk,tkc->tc", weights, raw.sum(1)[places])[:, :1090]
    np.testing.assert_allclose(y.cpu().numpy(), expected, rtol=1e-5, atol=1e-5)
