"""A resident matrix in int4_g32 or int8_g32 times any number of tokens: projections, dense MLPs, shared expert, head.

Tiles of 32 rows are shared among the threads by one counter: a core that is slow or busy elsewhere takes fewer. Each
tile's weights are read from memory once for all tokens. From four tokens on, int8 weights are used for four at a time;
from eight on, an INT4 tile is first widened to int8, in the cache, and treated the same (a third faster).
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numba import get_num_threads, njit, prange

from quant import activations, aligned, int4_g32, int8_g32
from quant.activations import encode_token, row
from quant.simd import atomic_add, kernel, store_tile

FORMATS: dict[str, ModuleType] = {"int4_g32": int4_g32, "int8_g32": int8_g32}
ROWS = 32
ALONE = 1 << 20  # bytes of weights times tokens below which waking other threads costs more than they save
MANY = 1 << 17  # activations that are worth encoding on several threads
LARGEST_TASK = 2 * 1024 * 1024  # bytes of weights
TASKS_PER_THREAD = 24


class Matrix(NamedTuple):
    """One matrix [rows, columns], packed for the kernels; its last tile is filled up with zero weights."""

    format: str  # a key of FORMATS
    blocks: np.ndarray  # uint8 [rows / 32 rounded up, ...] as the format lays it out
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


def pack_int4(packed: np.ndarray, scales: np.ndarray) -> Matrix:
    """A matrix as released: packed uint8 [rows, columns / 2], scales uint16 [rows, columns / 32] (bits of bf16)."""
    return _pack("int4_g32", packed, scales, int4_g32.ZERO * 0x11)


def pack_int8(codes: np.ndarray, scales: np.ndarray) -> Matrix:
    """A matrix from codes int8 [rows, columns] and scales uint16 [rows, columns / 32] (bits of bf16)."""
    return _pack("int8_g32", codes, scales, 0)


def _pack(name: str, weights: np.ndarray, scales: np.ndarray, zero: int) -> Matrix:
    rows, columns = len(weights), 32 * scales.shape[1]
    missing = -rows % ROWS
    if missing:
        weights = np.pad(weights, ((0, missing), (0, 0)), constant_values=zero)
        scales = np.pad(scales, ((0, missing), (0, 0)))
    blocks = FORMATS[name].empty(1, rows + missing, columns).blocks[0]
    FORMATS[name].pack(weights, scales, blocks)
    return Matrix(name, blocks, rows, columns)


def encode(name: str, weights: np.ndarray) -> Matrix:
    """Quantize weights fp32 [rows, columns], columns a multiple of 32, to the format `name`."""
    return (pack_int4 if name == "int4_g32" else pack_int8)(*FORMATS[name].encode(weights))


def can_join(matrices: Sequence[Any]) -> bool:
    """Whether `join` takes them: one format, one width, and whole tiles of rows but for the last. Asks for `format`,
    `rows` and `columns` alone, which other matrices of these formats have too."""
    alike = len({(matrix.format, matrix.columns) for matrix in matrices}) == 1
    return alike and all(matrix.rows % ROWS == 0 for matrix in matrices[:-1])


def join(matrices: Sequence[Matrix]) -> Matrix:
    """The matrices one below the other."""
    assert can_join(matrices)
    tiles = [matrix.blocks for matrix in matrices]
    blocks = aligned.empty((sum(len(part) for part in tiles), *tiles[0].shape[1:]))
    np.concatenate(tiles, out=blocks)
    return Matrix(matrices[0].format, blocks, sum(matrix.rows for matrix in matrices), matrices[0].columns)


def decode(matrix: Matrix) -> np.ndarray:
    """fp32 [rows, columns]: what the matrix means."""
    return FORMATS[matrix.format].decode(matrix.blocks, matrix.columns)[: matrix.rows]


def multiply_reference(matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """What `multiply` computes, bit for bit, in NumPy."""
    return FORMATS[matrix.format].multiply(matrix.blocks, activations.encode(x))[:, : matrix.rows]


def multiply(matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """x fp32 [tokens, columns], C-contiguous -> fp32 [tokens, rows]. Call from one thread at a time."""
    tokens, columns = x.shape
    assert columns == matrix.columns, (columns, matrix.columns)
    inputs = activations.zeros(tokens, columns)
    narrow = matrix.format == "int4_g32"
    threads = get_num_threads() if matrix.nbytes * tokens > ALONE else 1
    tiles = len(matrix.blocks)
    work = Work(
        matrix.blocks.reshape(tiles, -1),
        narrow,
        aligned.empty(
            (threads, int8_g32.widened_bytes(matrix.blocks.shape[1]) if narrow and tokens >= int8_g32.WIDEN else 0)
        ),
        np.empty((tokens, ROWS * tiles), np.float32),
        np.zeros(8, np.int64),
        max(1, min(tiles // (TASKS_PER_THREAD * threads), LARGEST_TASK * tiles // max(1, matrix.nbytes))),
    )
    if threads > 1:
        _together(x, inputs, work, threads)
    else:
        _alone(x, inputs, work)
    return work.y if matrix.rows == ROWS * tiles else np.ascontiguousarray(work.y[:, : matrix.rows])


class Work(NamedTuple):
    """One product as the threads see it, but for its inputs: parallel loops take no tuples within tuples."""

    tiles: np.ndarray  # uint8 [tiles, bytes of a tile]
    narrow: bool  # whether they are int4_g32
    widened: np.ndarray  # uint8 [threads, bytes of a widened tile, or 0]
    y: np.ndarray  # fp32 [tokens, 32 * tiles]
    next: np.ndarray  # int64, the first is the number of tasks taken
    step: int  # tiles of one task


@njit(parallel=True, cache=True)
def _together(x, inputs, work, threads):
    if x.size > MANY:
        for token in prange(x.shape[0]):
            encode_token(x, inputs, token)
    else:
        for token in range(x.shape[0]):
            encode_token(x, inputs, token)
    for thread in prange(threads):
        _take_tiles(work, inputs, thread)


@njit(cache=True)
def _alone(x, inputs, work):
    for token in range(x.shape[0]):
        encode_token(x, inputs, token)
    _take_tiles(work, inputs, 0)


@kernel
def _take_tiles(work, inputs, thread):
    """One thread: take tasks until none is left."""
    tiles = work.tiles.shape[0]
    while True:
        start = work.step * atomic_add(work.next, 0, 1)
        if start >= tiles:
            break
        for tile in range(start, min(start + work.step, tiles)):
            _tile(work, inputs, tile, work.widened[thread])


@kernel
def _tile(work, inputs, tile, widened):
    """Thirty-two rows for every token."""
    weights, tokens = work.tiles[tile], work.y.shape[0]
    if not work.narrow:
        _int8_tile(weights, weights.size // int8_g32.BLOCK, inputs, work.y, tile)
    elif tokens >= int8_g32.WIDEN:
        int8_g32.widen(weights, 0, weights.size // int4_g32.BLOCK, widened)
        _int8_tile(widened, widened.size // int8_g32.BLOCK, inputs, work.y, tile)
    else:
        wide, twos = weights.size // int4_g32.BLOCK, tokens // 2 * 2
        for token in range(0, twos, 2):
            low, high, low2, high2 = int4_g32.dot_tile2(weights, 0, wide, row(inputs, token), row(inputs, token + 1))
            store_tile(work.y[token], 128 * tile, low, high)
            store_tile(work.y[token + 1], 128 * tile, low2, high2)
        for token in range(twos, tokens):
            low, high = int4_g32.dot_tile(weights, 0, wide, row(inputs, token))
            store_tile(work.y[token], 128 * tile, low, high)


@kernel
def _int8_tile(weights, groups, inputs, y, tile):
    fours = y.shape[0] // 4 * 4
    for token in range(0, fours, 4):
        rows = row(inputs, token), row(inputs, token + 1), row(inputs, token + 2), row(inputs, token + 3)
        low, high = int8_g32.dot_tile4(weights, 0, groups, rows)
        store_tile(y[token], 128 * tile, low[0], high[0])
        store_tile(y[token + 1], 128 * tile, low[1], high[1])
        store_tile(y[token + 2], 128 * tile, low[2], high[2])
        store_tile(y[token + 3], 128 * tile, low[3], high[3])
    for token in range(fours, y.shape[0]):
        low, high = int8_g32.dot_tile(weights, 0, groups, row(inputs, token))
        store_tile(y[token], 128 * tile, low, high)
