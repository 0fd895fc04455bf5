import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant import ISA, activations, int4_g32, kernels

SHAPES = [(32, 32), (32, 64), (96, 96), (64, 224)]


def released(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A random matrix as checkpoints store it: packed nibbles and bf16 bits."""
    packed = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    scales = (rng.standard_normal((rows, columns // 32)).astype(np.float32) * 0.1).view(np.uint32) >> 16
    return packed, scales.astype(np.uint16)


def stack(rng: np.random.Generator, experts: int, rows: int, columns: int) -> int4_g32.Int4G32:
    matrix = int4_g32.empty(experts, rows, columns)
    for blocks in matrix.blocks:
        int4_g32.pack(*released(rng, rows, columns), blocks)
    return matrix


def test_compiled_for_the_expected_cpu() -> None:
    assert os.environ.get("KIMI_LOCAL_EXPECT_ISA", ISA) == ISA


def test_documented_word() -> None:
    """The int32 0x76543210 holds -8..-1, least significant nibble first."""
    packed = np.tile(np.array([0x76543210], "<i4").view(np.uint8), (32, 4))
    one = np.full((32, 1), 0x3F80, np.uint16)  # bf16 1.0
    matrix = int4_g32.empty(1, 32, 32)
    int4_g32.pack(packed, one, matrix.blocks[0])
    np.testing.assert_array_equal(int4_g32.decode(matrix.blocks[0], 32)[0, :8], np.arange(-8, 0))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_pack_loses_nothing(rows: int, columns: int) -> None:
    packed, scales = released(np.random.default_rng(rows + columns), rows, columns)
    matrix = int4_g32.empty(1, rows, columns)
    int4_g32.pack(packed, scales, matrix.blocks[0])
    unpacked = int4_g32.unpack(matrix.blocks[0], columns)
    np.testing.assert_array_equal(unpacked[0], packed)
    np.testing.assert_array_equal(unpacked[1], scales)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_decode_is_the_released_meaning(rows: int, columns: int) -> None:
    packed, scales = released(np.random.default_rng(3), rows, columns)
    codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(rows, columns).astype(np.float32) - 8
    steps = (scales.astype(np.uint32) << 16).view(np.float32)
    matrix = int4_g32.empty(1, rows, columns)
    int4_g32.pack(packed, scales, matrix.blocks[0])
    np.testing.assert_array_equal(int4_g32.decode(matrix.blocks[0], columns), codes * np.repeat(steps, 32, axis=1))


def test_size_is_the_stated_bits_per_weight() -> None:
    matrix = int4_g32.empty(2, 2048, 7168)
    assert matrix.blocks[0].nbytes * 8 == int4_g32.BITS_PER_WEIGHT * 2048 * 7168


def test_multiply_approximates_the_product() -> None:
    rng = np.random.default_rng(5)
    matrix = stack(rng, 1, 64, 256)
    x = rng.standard_normal((7, 256)).astype(np.float32)
    exact = x @ int4_g32.decode(matrix.blocks[0], 256).T
    found = int4_g32.multiply(matrix.blocks[0], activations.encode(x))
    assert np.linalg.norm(found - exact) < 0.01 * np.linalg.norm(exact)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 8),
    st.sampled_from([1, 2]),
)
def test_moe_equals_reference_bit_for_bit(
    seed: int, tokens: int, hidden: int, inner: int, experts: int, threads: int
) -> None:
    import numba

    rng = np.random.default_rng(seed)
    layer = kernels.Experts(
        stack(rng, experts, 2 * 32 * inner, 32 * hidden), stack(rng, experts, 32 * hidden, 32 * inner)
    )
    k = int(rng.integers(1, experts + 1))
    x = rng.standard_normal((tokens, 32 * hidden)).astype(np.float32)
    ids = np.array([rng.permutation(experts)[:k] for _ in range(tokens)])
    weights = rng.random((tokens, k)).astype(np.float32)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    found = kernels.moe(layer, x, ids, weights)
    np.testing.assert_array_equal(found, kernels.moe_reference(layer, x, ids, weights))


def test_batch_equals_single_tokens() -> None:
    rng = np.random.default_rng(9)
    layer = kernels.Experts(stack(rng, 6, 128, 96), stack(rng, 6, 96, 64))
    x = rng.standard_normal((21, 96)).astype(np.float32)
    ids = np.array([rng.permutation(6)[:3] for _ in range(21)])
    weights = rng.random((21, 3)).astype(np.float32)
    together = kernels.moe(layer, x, ids, weights)
    for t in range(21):
        one = kernels.moe(layer, x[t : t + 1], ids[t : t + 1], weights[t : t + 1])
        np.testing.assert_array_equal(one[0], together[t])
