"""Codes of eight bits with a scale per tile into bf16 or fp32: what attention reads of a cache that is kept so.

Plain loops, which LLVM turns into vectors. A value is code times scale in fp32, rounded to the nearest, ties to even.
"""

import numpy as np
from numba import njit, prange

from quant.simd import kernel

ALONE = 1 << 18  # bytes of rows below which waking other threads costs more than they save
STEP = 64  # rows that a thread takes at a time
FROM_FP8 = np.float32(2.0**120)  # between the biases of both exponents


def decode(kind: str, stored: np.ndarray, start: int, count: int, scales: np.ndarray, out: np.ndarray) -> None:
    """Fill the first `count` columns of `out`, float32 or bits of bf16 as int16 [rows, ..], from uint8 `stored`.

    The codes of a row of `stored` [rows, ..], of `kind` fp8 (e4m3, no NaN) or int8, begin at byte `start`; scales are
    fp32 [rows, tiles], for as many codes each. `stored` and `out` are C-contiguous.
    """
    (_together if stored.size > ALONE else _alone)(kind == "fp8", stored, start, count, scales, out)


@njit(parallel=True, cache=True)
def _together(is_fp8, stored, start, count, scales, out):
    rows = stored.shape[0]
    for piece in prange(-(-rows // STEP)):
        for row in range(piece * STEP, min((piece + 1) * STEP, rows)):
            _row(is_fp8, stored, start, count, scales, out, row)


@njit(cache=True)
def _alone(is_fp8, stored, start, count, scales, out):
    for row in range(stored.shape[0]):
        _row(is_fp8, stored, start, count, scales, out, row)


@kernel
def _row(is_fp8, stored, start, count, scales, out, row):
    tile = count // scales.shape[1]
    for at in range(scales.shape[1]):
        first = start + at * tile
        scale = scales[row, at]
        codes, values = stored[row, first : first + tile], out[row, at * tile : (at + 1) * tile]
        if is_fp8:
            for i in range(tile):
                _put(values, i, _fp8(codes[i]) * scale)
        else:
            for i in range(tile):
                _put(values, i, np.float32(np.int8(codes[i])) * scale)


@kernel
def _fp8(code):
    bits = np.uint32(code)
    bits = (bits & np.uint32(0x80)) << np.uint32(24) | (bits & np.uint32(0x7F)) << np.uint32(20)
    return np.uint32(bits).view(np.float32) * FROM_FP8


@kernel
def _put(values, i, x):
    if values.itemsize == 4:
        values[i] = x
    else:
        bits = np.float32(x).view(np.uint32)
        values[i] = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
