import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant import bf16


def random(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as bf16 bits, and the same values in float64."""
    bits = (rng.standard_normal((rows, columns)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits.view(np.int16), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@given(st.integers(0, 2**32 - 1), st.integers(4, 70), st.integers(1, 20), st.integers(1, 5))
def test_equals_the_plain_product(seed: int, rows: int, lanes: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    bits, values = random(rng, rows, 16 * lanes)
    x = rng.standard_normal((tokens, 16 * lanes)).astype(np.float32)
    exact = x @ values.T
    scale = np.abs(x) @ np.abs(values).T  # what rounding is measured against
    assert (np.abs(bf16.multiply(bits, x) - exact) <= 1e-6 * scale).all()


def test_large_enough_to_be_shared_by_threads() -> None:
    rng = np.random.default_rng(0)
    bits, values = random(rng, 1003, 512)
    x = rng.standard_normal((3, 512)).astype(np.float32)
    np.testing.assert_allclose(bf16.multiply(bits, x), x @ values.T, rtol=1e-4, atol=1e-3)


def test_a_token_is_the_same_alone_and_in_company() -> None:
    rng = np.random.default_rng(1)
    bits, _ = random(rng, 42, 112)
    x = rng.standard_normal((8, 112)).astype(np.float32)
    together = bf16.multiply(bits, x)
    for t in range(8):
        np.testing.assert_array_equal(bf16.multiply(bits, x[t : t + 1])[0], together[t])


@pytest.mark.parametrize(("rows", "columns", "expected"), [(4, 16, True), (3, 16, False), (8, 24, False)])
def test_supported_shapes(rows: int, columns: int, expected: bool) -> None:
    assert bf16.supports(rows, columns) is expected


@pytest.mark.parametrize(("heads", "rows", "columns"), [(3, 5, 16), (9, 576, 128), (7, 192, 500)])
def test_a_matrix_per_head(heads: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(2)
    matrices = [random(rng, rows, columns) for _ in range(heads)]
    bits, values = np.stack([b for b, _ in matrices]), np.stack([v for _, v in matrices])
    x = rng.standard_normal((2, heads, columns)).astype(np.float32)
    exact = np.einsum("hrc,thc->thr", values, x)
    found = bf16.multiply_heads(bf16.pack_heads(bits), x)[:, :, :rows]
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(bf16.multiply_heads(bf16.pack_heads(bits), x[1:])[:, :, :rows], found[1:])


@given(st.integers(0, 2**32 - 1), st.integers(1, 11), st.integers(1, 200), st.integers(1, 5))
def test_weighted_sums_of_rows(seed: int, sums: int, rows: int, lanes: int) -> None:
    rng = np.random.default_rng(seed)
    bits, values = random(rng, rows, 16 * lanes + 16)
    weights = rng.random((sums, rows)).astype(np.float32)
    exact = weights @ values[:, : 16 * lanes]
    scale = weights @ np.abs(values[:, : 16 * lanes])
    assert (np.abs(bf16.combine(weights, bits, 16 * lanes) - exact) <= 1e-5 * scale).all()


def test_weighted_sums_large_enough_to_be_shared() -> None:
    rng = np.random.default_rng(3)
    bits, values = random(rng, 3000, 576)
    weights = rng.random((9, 3000)).astype(np.float32)
    np.testing.assert_allclose(bf16.combine(weights, bits, 512), weights @ values[:, :512], rtol=1e-4, atol=1e-2)
