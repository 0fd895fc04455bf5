import os

import numpy as np
import pytest

from quant import ISA, activations, int8_g32
from quant.scales import from_bits

SHAPES = [(32, 32), (32, 64), (96, 96), (64, 224)]


def stored(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A random matrix as checkpoints store it: codes, and scales as bits of bf16."""
    codes = rng.integers(-128, 128, (rows, columns), np.int8)  # -128 is not written, but means what it says
    scales = (rng.standard_normal((rows, columns // 32)).astype(np.float32) * 0.1).view(np.uint32) >> 16
    return codes, scales.astype(np.uint16)


def packed(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    blocks = int8_g32.empty(1, *codes.shape).blocks[0]
    int8_g32.pack(codes, scales, blocks)
    return blocks


def test_compiled_for_the_expected_cpu() -> None:
    assert os.environ.get("KIMI_LOCAL_EXPECT_ISA", ISA) == ISA


def test_documented_place_of_a_code() -> None:
    codes, scales = stored(np.random.default_rng(0), 64, 96)
    blocks = packed(codes, scales)
    for row, column in [(0, 0), (17, 5), (33, 95), (63, 64)]:
        block = blocks[row // 32, column // 32]
        assert block[128 * (column % 32 // 4) + 4 * (row % 32) + column % 4] == int(codes[row, column]) + 128
        assert block[1024:].view(np.uint16)[row % 32] == scales[row, column // 32]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_pack_loses_nothing(rows: int, columns: int) -> None:
    codes, scales = stored(np.random.default_rng(rows + columns), rows, columns)
    unpacked = int8_g32.unpack(packed(codes, scales), columns)
    np.testing.assert_array_equal(unpacked[0], codes)
    np.testing.assert_array_equal(unpacked[1], scales)


def test_codes_may_lie_anywhere_in_a_file() -> None:
    codes, scales = stored(np.random.default_rng(1), 32, 64)
    crooked = np.empty(codes.size + 1, np.uint8)[1:].view(np.int8).reshape(codes.shape)
    crooked[:] = codes
    np.testing.assert_array_equal(packed(crooked, scales), packed(codes, scales))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_decode_is_the_stored_meaning(rows: int, columns: int) -> None:
    codes, scales = stored(np.random.default_rng(3), rows, columns)
    expected = codes.astype(np.float32) * np.repeat(from_bits(scales), 32, axis=1)
    np.testing.assert_array_equal(int8_g32.decode(packed(codes, scales), columns), expected)


def test_size_is_the_stated_bits_per_weight() -> None:
    assert int8_g32.empty(2, 2048, 7168).blocks[0].nbytes * 8 == int8_g32.BITS_PER_WEIGHT * 2048 * 7168


def test_encode_rounds_to_nearest() -> None:
    weights = np.random.default_rng(4).standard_normal((33, 96)).astype(np.float32)
    weights[7] = 0
    codes, scales = int8_g32.encode(weights)
    assert codes.dtype == np.int8 and codes.min() >= -127
    steps = np.repeat(from_bits(scales), 32, axis=1)
    # Rounding the scale to bf16 may put the largest magnitude half a per cent, which is half a step, out of reach.
    assert (np.abs(codes * steps - weights) <= 0.76 * steps).all()
    assert np.linalg.norm(codes * steps - weights) < 0.01 * np.linalg.norm(weights)


def test_multiply_approximates_the_product() -> None:
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((64, 256)).astype(np.float32)
    x = rng.standard_normal((7, 256)).astype(np.float32)
    found = int8_g32.multiply(packed(*int8_g32.encode(weights)), activations.encode(x))
    assert np.linalg.norm(found - x @ weights.T) < 0.012 * np.linalg.norm(x @ weights.T)
