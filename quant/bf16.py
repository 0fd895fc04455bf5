"""bf16 matrices times a few fp32 vectors: the resident weights of a decode step, at the speed of memory.

Accumulates in fp32, sixteen lanes per row, four rows at a time. The order of the sums differs from any library's, so
results agree with a plain product to rounding, not to the bit.
"""

import numpy as np
from numba import get_num_threads, njit, prange

from quant import aligned
from quant.simd import (
    atomic_add,
    bf16_to_f32,
    fma_f32,
    kernel,
    load_f32x16,
    load_i16x16,
    reduce_f32,
    splat_f32,
    store_f32x16,
)

LANES, ROWS = 16, 4
ALONE = 1 << 20  # bytes of weights below which waking other threads costs more than they save
PIECE = 128 * 1024  # bytes of weights one loop iteration handles
BLOCK = 64  # rows of a head that are summed together
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


def pack_heads(weights: np.ndarray) -> np.ndarray:
    """Bits int16 [heads, rows, columns] -> [heads, rows / 64 rounded up, columns, 64], as `multiply_heads` reads them.

    Sums of 64 rows stay in registers while one unbroken stream passes. Rows that are missing become zeros.
    """
    heads, rows, columns = weights.shape
    blocks = -(-rows // BLOCK)
    out = aligned.empty((2 * heads * blocks * columns * BLOCK,)).view(np.int16).reshape(heads, blocks, columns, BLOCK)
    padded = np.pad(weights, ((0, 0), (0, blocks * BLOCK - rows), (0, 0)))
    out[:] = padded.reshape(heads, blocks, BLOCK, columns).transpose(0, 1, 3, 2)
    return out


def multiply_heads(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A matrix per head: weights from `pack_heads`, x fp32 [tokens, heads, columns], C-contiguous, -> fp32 [tokens,
    heads, rows rounded up to 64]."""
    heads, blocks, columns, _ = weights.shape
    assert x.shape[1:] == (heads, columns)
    y = np.empty((len(x), heads, blocks * BLOCK), np.float32)
    flat = weights.reshape(heads * blocks, columns * BLOCK)
    step = max(1, PIECE // flat[0].nbytes)
    threads = get_num_threads() if weights.nbytes > ALONE else 1
    if threads > 1:
        _heads_together(flat, x, y, np.zeros(8, np.int64), step, threads)
    else:
        _heads_alone(flat, x, y)
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
def _heads_together(weights, x, y, next_piece, step, threads):
    for _ in prange(threads):
        _take_blocks(weights, x, y, next_piece, step)


@njit(cache=True)
def _heads_alone(weights, x, y):
    for block in range(weights.shape[0]):
        _head_block(weights[block], block, x, y)


@kernel
def _take_blocks(weights, x, y, next_piece, step):
    """One thread: take pieces of `step` blocks until none is left."""
    blocks = weights.shape[0]
    while True:
        start = step * atomic_add(next_piece, 0, 1)
        if start >= blocks:
            break
        for block in range(start, min(start + step, blocks)):
            _head_block(weights[block], block, x, y)


@kernel
def _head_block(weights, block, x, y):
    """Sixty-four rows of one head for every token."""
    per_head = y.shape[2] // BLOCK
    head, place = block // per_head, 4 * BLOCK * (block % per_head)
    for token in range(x.shape[0]):
        inputs, out = x[token, head], y[token, head]
        a = splat_f32(np.float32(0))
        b, c, d = a, a, a
        for column in range(inputs.size):
            value, at = splat_f32(inputs[column]), 2 * BLOCK * column
            a = fma_f32(bf16_to_f32(load_i16x16(weights, at)), value, a)
            b = fma_f32(bf16_to_f32(load_i16x16(weights, at + 32)), value, b)
            c = fma_f32(bf16_to_f32(load_i16x16(weights, at + 64)), value, c)
            d = fma_f32(bf16_to_f32(load_i16x16(weights, at + 96)), value, d)
        store_f32x16(out, place, a)
        store_f32x16(out, place + 64, b)
        store_f32x16(out, place + 128, c)
        store_f32x16(out, place + 192, d)


@kernel
def _rows(weights, x, y, start, stop):
    flat, columns = weights.reshape(-1), weights.shape[1]
    for at in range(start, stop, ROWS):
        row = min(at, weights.shape[0] - ROWS)  # the last four rows may be done twice
        three = x.shape[0] // 3 * 3
        for t in range(0, three, 3):
            for pair in range(row, row + ROWS, 2):
                _two_rows_three_tokens(flat, pair, columns, x, y, t)
        for t in range(three, x.shape[0]):
            a, b, c, d = _four_rows(flat, 2 * row * columns, columns, x[t])
            y[t, row], y[t, row + 1], y[t, row + 2], y[t, row + 3] = a, b, c, d


@kernel
def _two_rows_three_tokens(flat, row, columns, x, y, t):
    """The same sums in the same order, each weight widened once for three tokens; six sums fill AVX2's registers."""
    offset, below = 2 * row * columns, 2 * columns
    first, second, third = x[t], x[t + 1], x[t + 2]
    a = splat_f32(np.float32(0))
    b, c, d, e, f = a, a, a, a, a
    for at in range(0, columns, LANES):
        one, two, three = load_f32x16(first, 4 * at), load_f32x16(second, 4 * at), load_f32x16(third, 4 * at)
        weight = bf16_to_f32(load_i16x16(flat, offset + 2 * at))
        a, b, c = fma_f32(weight, one, a), fma_f32(weight, two, b), fma_f32(weight, three, c)
        weight = bf16_to_f32(load_i16x16(flat, offset + below + 2 * at))
        d, e, f = fma_f32(weight, one, d), fma_f32(weight, two, e), fma_f32(weight, three, f)
    y[t, row], y[t + 1, row], y[t + 2, row] = reduce_f32(a), reduce_f32(b), reduce_f32(c)
    y[t, row + 1], y[t + 1, row + 1], y[t + 2, row + 1] = reduce_f32(d), reduce_f32(e), reduce_f32(f)


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
