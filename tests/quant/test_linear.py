from collections.abc import Iterator

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant import linear
from quant.linear import Matrix

FORMATS = sorted(linear.FORMATS)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def random(rng: np.random.Generator, name: str, rows: int, columns: int) -> Matrix:
    """A matrix of random codes, any there are, and scales of either sign."""
    scales = (rng.standard_normal((rows, columns // 32)).astype(np.float32) * 0.1).view(np.uint32) >> 16
    if name == "int4_g32":
        return linear.pack_int4(rng.integers(0, 256, (rows, columns // 2), np.uint8), scales.astype(np.uint16))
    return linear.pack_int8(rng.integers(-128, 128, (rows, columns), np.int8), scales.astype(np.uint16))


@pytest.mark.parametrize("name", FORMATS)
@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(1, 7), st.integers(1, 14))
def test_equals_reference_bit_for_bit(name: str, seed: int, rows: int, groups: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = random(rng, name, rows, 32 * groups)
    x = rng.standard_normal((tokens, 32 * groups)).astype(np.float32)
    found = linear.multiply(matrix, x)
    assert found.shape == (tokens, rows) and found.flags.c_contiguous
    np.testing.assert_array_equal(found, linear.multiply_reference(matrix, x))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 9, 300])
def test_any_number_of_threads_gives_the_same(
    name: str, threads: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "ALONE", 0)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    rng = np.random.default_rng(tokens)
    matrix = random(rng, name, 2000, 448)
    x = rng.standard_normal((tokens, 448)).astype(np.float32)
    np.testing.assert_array_equal(linear.multiply(matrix, x), linear.multiply_reference(matrix, x))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact(name: str, sign: int) -> None:
    """Every product as large as it can be: what would overflow sixteen bits shows here."""
    one = np.full((48, 2), 0x3F80, np.uint16)  # bf16 1.0
    lowest = np.where(np.arange(48) % 2 == 0, 0, 255).astype(np.uint8)[:, None]
    if name == "int4_g32":
        matrix = linear.pack_int4(np.repeat(lowest, 32, axis=1), one)
    else:
        matrix = linear.pack_int8((np.repeat(lowest, 64, axis=1) ^ 0x80).view(np.int8), one)
    for tokens in (1, 5, 12):
        x = np.full((tokens, 64), 127 * sign, np.float32)
        np.testing.assert_array_equal(linear.multiply(matrix, x), x @ linear.decode(matrix).T)


@pytest.mark.parametrize(("name", "bound"), [("int4_g32", 0.1), ("int8_g32", 0.012)])
def test_encoded_weights_give_nearly_the_product(name: str, bound: float) -> None:
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((80, 256)).astype(np.float32)
    x = rng.standard_normal((4, 256)).astype(np.float32)
    exact = x @ weights.T
    matrix = linear.encode(name, weights)
    assert np.linalg.norm(linear.multiply(matrix, x) - exact) < bound * np.linalg.norm(exact)
    assert np.linalg.norm(linear.decode(matrix) - weights) < bound * np.linalg.norm(weights)


def test_int4_encoding_beats_the_largest_magnitude() -> None:
    weights = np.random.default_rng(2).standard_normal((64, 512)).astype(np.float32)
    groups = weights.reshape(64, 16, 32)
    steps = np.abs(groups).max(axis=2, keepdims=True) / 7
    plain = np.linalg.norm(np.rint(groups / steps) * steps - groups)
    assert np.linalg.norm(linear.decode(linear.encode("int4_g32", weights)) - weights) < 0.95 * plain


@pytest.mark.parametrize("name", FORMATS)
def test_zero_weights_and_zero_inputs(name: str) -> None:
    matrix = linear.encode(name, np.zeros((16, 32), np.float32))
    assert not linear.multiply(matrix, np.ones((2, 32), np.float32)).any()
    assert not linear.multiply(matrix, np.zeros((2, 32), np.float32)).any()
    assert linear.multiply(matrix, np.empty((0, 32), np.float32)).shape == (0, 16)


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_scale_shows(name: str) -> None:
    nan = np.full((32, 2), 0x7FC0, np.uint16)
    weights = np.ones((32, 32), np.uint8) if name == "int4_g32" else np.ones((32, 64), np.int8)
    matrix = (linear.pack_int4 if name == "int4_g32" else linear.pack_int8)(weights, nan)
    for tokens in (1, 9):
        assert np.isnan(linear.multiply(matrix, np.ones((tokens, 64), np.float32))).all()


def test_bytes_of_a_matrix() -> None:
    rng = np.random.default_rng(4)
    assert random(rng, "int8_g32", 576, 7168).nbytes * 8 == 8.5 * 576 * 7168
    assert random(rng, "int4_g32", 48, 64).nbytes * 8 == 4.5 * 64 * 64  # to whole tiles of 32 rows


@pytest.mark.parametrize("name", ["int4_g32", "int8_g32"])
def test_joined_matrices_are_those_matrices(name: str) -> None:
    rng = np.random.default_rng(11)
    parts = [linear.encode(name, rng.standard_normal((rows, 96)).astype(np.float32)) for rows in (64, 32, 48)]
    x = rng.standard_normal((3, 96)).astype(np.float32)
    found = linear.multiply(linear.join(parts), x)
    np.testing.assert_array_equal(found, np.concatenate([linear.multiply(part, x) for part in parts], axis=1))
    assert not linear.can_join(parts[::-1])
