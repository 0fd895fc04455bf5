"""Rows of codes decoded, bit by bit as their definition spelled out in NumPy; also under every instruction set."""

import numpy as np
import pytest

from quant import kv_rows

FP8 = np.array([0] + [m * 2.0**-9 for m in range(1, 8)] + [(8 + m) * 2.0**e for e in range(-9, 6) for m in range(8)])
LEVELS = {  # of every code; e4m3 has NaN at the end of either half, which is never written
    "fp8": np.concatenate([FP8[:127], [0.0], -FP8[:127], [0.0]]).astype(np.float32),
    "int8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
}


def bf16(values: np.ndarray) -> np.ndarray:
    """Bits, uint16, of the nearest bf16; of two equally near the even one."""
    whole = values.astype(np.float64)
    below = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)  # toward zero
    step = ((values.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)  # the next one away from zero
    down, up = np.abs(whole - below), np.abs(step.astype(np.float64) - whole)
    is_odd = (below.view(np.uint32) >> 16) & 1 == 1
    bits = np.where((up < down) | ((up == down) & is_odd), step, below).view(np.uint32)
    return (bits >> 16).astype(np.uint16)


def draw(kind: str, rows: int, tiles: int, tile: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored bytes, of which those before `start` and after the codes mean something else, and scales."""
    rng = np.random.default_rng(rows * tile + start)
    stored = rng.integers(0, 256, (rows, start + tiles * tile + 3), np.uint8)
    if kind == "fp8":
        stored[(stored & 0x7F) == 0x7F] = 0
    scales = (rng.standard_normal((rows, tiles)) * 10.0 ** rng.uniform(-6, 4, (rows, 1))).astype(np.float32)
    return stored, scales


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize(
    ("rows", "tiles", "tile", "start"),
    [(1, 4, 128, 144), (5, 1, 7, 6), (3, 3, 16, 12), (700, 4, 128, 144), (40_000, 1, 8, 4)],  # the last two in parallel
)
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_the_definition(kind: str, rows: int, tiles: int, tile: int, start: int, dtype: type) -> None:
    stored, scales = draw(kind, rows, tiles, tile, start)
    count, width = tiles * tile, tiles * tile + 5
    out = np.full((rows, width), 7, dtype)
    kv_rows.decode(kind, stored, start, count, scales, out)
    expected = LEVELS[kind][stored[:, start : start + count]] * np.repeat(scales, tile, axis=1)
    found = out[:, :count]
    if dtype == np.float32:
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    else:
        np.testing.assert_array_equal(found.view(np.uint16), bf16(expected))
    assert (out[:, count:] == 7).all(), "what follows is another's"


@pytest.mark.parametrize("kind", LEVELS)
def test_every_code(kind: str) -> None:
    codes = np.arange(256, dtype=np.uint8)[None]
    if kind == "fp8":
        codes = np.where((codes & 0x7F) == 0x7F, 0, codes).astype(np.uint8)
    out = np.empty((1, 256), np.float32)
    kv_rows.decode(kind, codes, 0, 256, np.array([[1.0, 0.5]], np.float32), out)
    np.testing.assert_array_equal(out[0], LEVELS[kind][codes[0]] * np.repeat([1.0, 0.5], 128))
