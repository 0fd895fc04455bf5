"""bf16 matrices times a few fp32 vectors: the resident weights of a decode step, at the speed of memory.

Accumulates in fp32, sixteen lanes per row, four rows at a time. The order of the sums differs from any library's, so
results agree with a plain product to rounding, not to the bit.
"""

import numpy as np
from numba import njit, prange

from quant.simd import bf16_to_f32, fma_f32, kernel, load_f32x16, load_i16x16, reduce_f32, splat_f32, store_f32x16

LANES, ROWS = 16, 4
ALONE = 1 << 20  # bytes of weights below which waking other threads costs more than they save
PIECE = 128 * 1024  # bytes of weights one loop iteration handles
NEAR = 16  # rows of which a sum takes a column at a time


def supports(rows: int, columns: int) -> bool:
    """Whether `multiply` takes a matrix of this shape."""
    return columns % LANES == 0 and rows >= ROWS


def multiply(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x fp32 [tokens, columns] times weights, bf16 bits as int16 [rows, columns], -> fp32 [tokens, rows].

    Both C-contiguous and of a shape that `supports` allows.
    """
    rows, columns = weights.shape
    assert supports(rows, columns) and x.shape[1] == columns
    y = np.empty((len(x), rows), np.float32)
    step = max(ROWS, PIECE // (2 * columns) // ROWS * ROWS)
    (_together if weights.nbytes > ALONE else _alone)(weights, x, y, step)
    return y


def multiply_heads(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A matrix per head: weights [heads, rows, columns], x [tokens, heads, columns] -> [tokens, heads, rows]."""
    heads, rows, columns = weights.shape
    assert supports(rows, columns) and x.shape[1:] == (heads, columns)
    y = np.empty((len(x), heads, rows), np.float32)
    (_heads_together if weights.nbytes > ALONE else _heads_alone)(weights, x, y)
    return y


def combine(weights: np.ndarray, rows: np.ndarray, columns: int) -> np.ndarray:
    """Weighted sums of rows: weights fp32 [sums, rows], rows as bf16 bits [rows, width] -> fp32 [sums, columns].

    The first `columns` of each row are used, a multiple of 16. Both C-contiguous.
    """
    sums = len(weights)
    assert columns % LANES == 0 and weights.shape[1] == len(rows)
    if sums % ROWS:
        weights = np.concatenate([weights, np.zeros((-sums % ROWS, len(rows)), np.float32)])
    y = np.zeros((len(weights), columns), np.float32)
    (_combine_together if 2 * rows.shape[0] * columns > ALONE else _combine_alone)(weights, rows, y)
    return y[:sums]


@njit(parallel=True, cache=True)
def _together(weights, x, y, step):
    rows = weights.shape[0]
    for piece in prange(-(-rows // step)):
        _rows(weights, x, y, piece * step, min((piece + 1) * step, rows))


@njit(cache=True)
def _alone(weights, x, y, step):
    _rows(weights, x, y, 0, weights.shape[0])


@njit(parallel=True, cache=True)
def _heads_together(weights, x, y):
    for head in prange(weights.shape[0]):
        _head(weights, x, y, head)


@njit(cache=True)
def _heads_alone(weights, x, y):
    for head in range(weights.shape[0]):
        _head(weights, x, y, head)


@kernel
def _head(weights, x, y, head):
    for t in range(x.shape[0]):
        _rows(weights[head], x[t, head : head + 1], y[t, head : head + 1], 0, weights.shape[1])


@kernel
def _rows(weights, x, y, start, stop):
    flat, columns = weights.reshape(-1), weights.shape[1]
    for at in range(start, stop, ROWS):
        row = min(at, weights.shape[0] - ROWS)  # the last four rows may be done twice
        for t in range(x.shape[0]):
            a, b, c, d = _four_rows(flat, 2 * row * columns, columns, x[t])
            y[t, row], y[t, row + 1], y[t, row + 2], y[t, row + 3] = a, b, c, d


@kernel
def _four_rows(flat, offset, columns, x):
    a = splat_f32(np.float32(0))
    b, c, d = a, a, a
    for at in range(0, columns, LANES):
        value, here = load_f32x16(x, 4 * at), offset + 2 * at
        a = fma_f32(bf16_to_f32(load_i16x16(flat, here)), value, a)
        b = fma_f32(bf16_to_f32(load_i16x16(flat, here + 2 * columns)), value, b)
        c = fma_f32(bf16_to_f32(load_i16x16(flat, here + 4 * columns)), value, c)
        d = fma_f32(bf16_to_f32(load_i16x16(flat, here + 6 * columns)), value, d)
    return reduce_f32(a), reduce_f32(b), reduce_f32(c), reduce_f32(d)


@njit(parallel=True, cache=True)
def _combine_together(weights, rows, y):
    for block in prange(y.shape[0] // ROWS):
        _four_sums(weights, rows, y, block * ROWS)


@njit(cache=True)
def _combine_alone(weights, rows, y):
    for block in range(y.shape[0] // ROWS):
        _four_sums(weights, rows, y, block * ROWS)


@kernel
def _four_sums(weights, rows, y, first):
    """Add to sums first..first+3, a few rows at a time, which stay in the cache while the columns pass over them."""
    flat, width = rows.reshape(-1), rows.shape[1]
    for start in range(0, rows.shape[0], NEAR):
        stop = min(start + NEAR, rows.shape[0])
        for at in range(0, y.shape[1], LANES):
            a, b = load_f32x16(y[first], 4 * at), load_f32x16(y[first + 1], 4 * at)
            c, d = load_f32x16(y[first + 2], 4 * at), load_f32x16(y[first + 3], 4 * at)
            for row in range(start, stop):
                value = bf16_to_f32(load_i16x16(flat, 2 * (row * width + at)))
                a = fma_f32(splat_f32(weights[first, row]), value, a)
                b = fma_f32(splat_f32(weights[first + 1, row]), value, b)
                c = fma_f32(splat_f32(weights[first + 2, row]), value, c)
                d = fma_f32(splat_f32(weights[first + 3, row]), value, d)
            store_f32x16(y[first], 4 * at, a)
            store_f32x16(y[first + 1], 4 * at, b)
            store_f32x16(y[first + 2], 4 * at, c)
            store_f32x16(y[first + 3], 4 * at, d)
