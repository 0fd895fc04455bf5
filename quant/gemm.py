"""Many tokens of one expert: its matrices decoded piece by piece, and products in floating point.

The integer kernels read few bytes and multiply token by token; from some number of tokens on it is less work to decode
a matrix once and leave the rest to a processor's matrix units, which a library drives: `Product` is that library. A
piece is decoded transposed, [columns, rows], because the formats keep sixteen rows side by side; it has few enough rows
for one small buffer. Weights and inputs are rounded to bf16, or not at all where the buffer is fp32. Matrices in a
rotated basis stay in it, and inputs are rotated: there are fewer tokens than rows.

    inputs    rotate, round                                     [n, hidden]
    gate_up   per piece: decode, product, SwiGLU in fp32        [n, intermediate]
    inputs    rotate, round
    down      per piece: decode, product, weight, add in fp32   [n, hidden]

A row of the result depends on its own input alone as far as it does in the library's products.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numba import get_num_threads, njit, prange

from quant import aligned, int4_g32
from quant.int4_g32 import BLOCK, COLUMNS, HALF, ROWS
from quant.kernels import Experts
from quant.rotation import rotate_row
from quant.simd import (
    add_f32,
    bf16_to_f32,
    byte_of,
    high_nibbles_down,
    kernel,
    load_as,
    load_f32x16,
    load_i16x16,
    load_u8x64,
    low_nibbles,
    mul_f32,
    splat_f32,
    splat_i32,
    store_as,
    store_f32x16,
    sub_i32,
    to_f32,
)
from quant.swiglu import swiglu_lanes
from quant.trellis import PANELS, matrix_bytes
from quant.trellis_moe import Matrices, TrellisExperts
from quant.trellis_moe import experts as trellis_experts
from quant.trellis_product import SCRATCH, decode_block, zero_of

PIECE = 2048  # rows that are decoded at once, at most; no slab of a trellis has more
BF16, FP32 = np.dtype(np.uint16), np.dtype(np.float32)  # of decoded weights and inputs; bf16 as its bits
Layer = Experts | TrellisExperts
Product = Callable[[np.ndarray, np.ndarray, np.ndarray], object]  # out [n, rows] = x [n, columns] @ w [columns, rows]


def numpy_product(x: np.ndarray, w: np.ndarray, out: np.ndarray) -> None:
    """Of fp32."""
    np.matmul(x, w, out=out)


def buffer_bytes(hidden: int, intermediate: int, dtype: np.dtype) -> int:
    """Of a decoded piece, at most: what `Gemm` keeps."""
    columns = max(-(-width // COLUMNS) * COLUMNS for width in (hidden, intermediate))
    rows = max(2 * intermediate, hidden)
    return min(PIECE, -(-rows // 128) * 128) * columns * dtype.itemsize


class Side(NamedTuple):
    """One matrix of one expert: as it is stored, and in pieces."""

    stored: np.ndarray | Matrices  # uint8 blocks of INT4, or the trellis matrices of all experts
    expert: int
    rows: int
    columns: int
    piece: int  # rows of a piece, padding included
    sign: np.ndarray  # fp32 [columns], or [0] where inputs are not rotated

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Number and first row of each."""
        return enumerate(range(0, self.rows, self.piece))


def sides(layer: Layer, expert: int) -> tuple[Side, Side]:
    """gate_up and down."""
    if isinstance(layer, TrellisExperts):
        first, second = (_trellis_side(matrix, expert) for matrix in (layer.gate_up, layer.down))
        return first, second
    hidden, intermediate = layer.down.blocks.shape[1] * ROWS, layer.gate_up.blocks.shape[1] * ROWS // 2
    gate_up, down = (stack.blocks[expert] for stack in layer)
    return _int4_side(gate_up, expert, hidden), _int4_side(down, expert, intermediate)


def _trellis_side(matrix: Matrices, expert: int) -> Side:
    return Side(matrix, expert, matrix.rows, matrix.columns, 16 * matrix.steps, matrix.sign)


def _int4_side(blocks: np.ndarray, expert: int, columns: int) -> Side:
    rows = len(blocks) * ROWS
    return Side(blocks, expert, rows, columns, min(PIECE, rows), np.empty(0, np.float32))


class Gemm:
    """Applies single experts to many tokens; keeps the buffer for pieces. Used from one thread at a time."""

    def __init__(self, product: Product = numpy_product, dtype: np.dtype = FP32) -> None:
        """`product` takes arrays of `dtype`: fp32, or uint16 that are bits of bf16."""
        self.product = product
        self.dtype = dtype
        self._buffer = aligned.empty((0,))

    def add(
        self, layer: Layer, expert: int, x: np.ndarray, tokens: np.ndarray, weights: np.ndarray, y: np.ndarray
    ) -> None:
        """y[tokens] += weights * expert(x[tokens]): x and y fp32 [.., hidden], tokens int64 [n], all different, weights
        fp32 [n]."""
        gate_up, down = sides(layer, expert)
        inner = np.empty((len(tokens), down.columns), np.float32)
        inputs = self._inputs(x, tokens, gate_up)
        for number, first in gate_up.pieces():
            _activate(self._multiply(layer, gate_up, number, inputs), inner, first // 2)
        inputs = self._inputs(inner, np.arange(len(tokens)), down)
        for number, first in down.pieces():
            _accumulate(self._multiply(layer, down, number, inputs), tokens, weights, y, first)

    def add_all(
        self,
        layer: Layer,
        experts: Iterable[int],
        x: np.ndarray,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        y: np.ndarray,
    ) -> None:
        """`add` of these `experts`, in order, for the tokens that chose them: ids and weights [tokens, k]."""
        for expert in experts:
            tokens, places = np.nonzero(topk_ids == expert)
            self.add(layer, expert, x, tokens, topk_weights[tokens, places], y)

    def _inputs(self, x: np.ndarray, tokens: np.ndarray, side: Side) -> np.ndarray:
        out = np.empty((len(tokens), side.columns), self.dtype)
        _prepare(x, tokens, side.sign, out)
        return out

    def _multiply(self, layer: Layer, side: Side, number: int, inputs: np.ndarray) -> np.ndarray:
        weights = self.decode(layer, side, number)
        out = np.empty((len(inputs), weights.shape[1]), self.dtype)
        self.product(inputs, weights, out)
        return out

    def decode(self, layer: Layer, side: Side, number: int) -> np.ndarray:
        """[columns, rows] of a piece, good until the next call; rows past the matrix are padding of the format."""
        rows = min(side.piece, side.rows - number * side.piece) if isinstance(layer, Experts) else side.piece
        columns = -(-side.columns // COLUMNS) * COLUMNS
        size = columns * rows * self.dtype.itemsize
        if self._buffer.size < size:
            self._buffer = aligned.empty((size,))
        out = self._buffer[:size].view(self.dtype)
        if isinstance(layer, TrellisExperts):
            assert isinstance(side.stored, Matrices)
            matrix, threads = side.stored, get_num_threads()
            scratch = aligned.empty((threads, 2, SCRATCH))
            shape = matrix.steps, matrix.chain, matrix.tiles
            _decode_trellis(layer.data, matrix.planes[side.expert], number, *shape, scratch, out)
        else:
            assert isinstance(side.stored, np.ndarray)
            first = number * side.piece // ROWS
            _decode_int4(side.stored[first : first + rows // ROWS], out)
        return out.reshape(columns, rows)[: side.columns]


def sample(formats: tuple[str, str], hidden: int, intermediate: int) -> Layer:
    """A layer of one expert whose bytes are all alike, to time; formats of gate_up and down."""
    shapes = (2 * intermediate, hidden), (hidden, intermediate)
    if formats[0] == "int4_g32":
        layer = Experts(*(int4_g32.empty(1, *shape) for shape in shapes))
        for stack in layer:
            stack.blocks[:] = ORDINARY
        return layer
    data = aligned.empty((sum(matrix_bytes(name, *shape) for name, shape in zip(formats, shapes, strict=True)),))
    data[:] = ORDINARY
    signs = np.ones(hidden, np.int8), np.ones(intermediate, np.int8)
    return trellis_experts(data, np.zeros(1, np.int64), [formats], signs)


ORDINARY = 0x3C  # as both bytes of a bf16 scale: about 0.01, so that nothing gets too small for full speed


# --- decoding --------------------------------------------------------------------------------------------------------
# A task has all rows of 64 columns: it writes whole stretches of 64 rows of `out`, and no more pages than a TLB holds.
# Nothing here holds Python's lock, so that other threads can have a drive read meanwhile.


@njit(parallel=True, cache=True, nogil=True)
def _decode_int4(blocks, out):
    """blocks uint8 [tiles, wide, 2, 576] -> out, flat, [columns padded, 32 * tiles]."""
    flat = blocks.reshape(-1)
    for column in prange(blocks.shape[1]):
        _int4_columns(flat, blocks.shape[0], blocks.shape[1], column, out)


@kernel
def _int4_columns(flat, tiles, wide, block, out):
    """The 64 columns of one block of every tile."""
    rows = ROWS * tiles
    for tile in range(tiles):
        at = (tile * wide + block) * BLOCK
        for group in range(2):
            low = bf16_to_f32(load_i16x16(flat, at + 512 + 32 * group))
            high = bf16_to_f32(load_i16x16(flat, at + HALF + 512 + 32 * group))
            for line in range(4 * group, 4 * group + 4):
                a, b = load_u8x64(flat, at + 64 * line), load_u8x64(flat, at + HALF + 64 * line)
                place = (COLUMNS * block + 8 * line) * rows + ROWS * tile
                _int4_four(low_nibbles(a), low, low_nibbles(b), high, out, place, rows)
                _int4_four(high_nibbles_down(a), low, high_nibbles_down(b), high, out, place + 4 * rows, rows)


@kernel
def _int4_four(a, low, b, high, out, place, rows):
    """Four columns of 32 rows."""
    for column in range(4):
        store_as(out, place + column * rows, _value(a, column, int4_g32.ZERO, low))
        store_as(out, place + column * rows + 16, _value(b, column, int4_g32.ZERO, high))


@kernel
def _value(codes, column, zero, scale):
    return mul_f32(to_f32(sub_i32(byte_of(codes, column), splat_i32(np.int32(zero)))), scale)


@njit(parallel=True, cache=True, nogil=True)
def _decode_trellis(data, planes, slab, steps, chain, tiles, scratch, out):
    """planes int64 [2, 3] of one expert in data uint8 -> out, flat, [columns padded, 16 * steps]: one slab."""
    for thread in prange(len(scratch)):
        for tile in range(thread, tiles, len(scratch)):
            _trellis_columns(data, planes, slab, steps, chain, tiles, tile, scratch[thread, 0], scratch[thread, 1], out)


@kernel
def _trellis_columns(data, planes, slab, steps, chain, tiles, tile, scratch, second, out):
    """The 64 columns of one tile."""
    halves, more = planes[0, 0], planes[1, 0]
    scales, more_scales = planes[0, 1] + 32 * slab * steps, planes[1, 1] + 32 * slab * steps
    tile_index = slab * tiles + tile
    for block in range(steps // 8):
        decode_block(halves, data, planes[0, 2] + tile_index * steps * 64 * halves, block, steps // 8, chain, scratch)
        if more:
            at = planes[1, 2] + tile_index * steps * 64 * more
            decode_block(more, data, at, block, steps // 8, chain, second)
        for panel in range(PANELS):
            place, offset = (COLUMNS * tile + 4 * panel) * 16 * steps + 128 * block, 256 * block
            if more:
                _two_planes(scratch, zero_of(halves), scales + offset, second, zero_of(more), more_scales + offset,
                            data, panel, out, place, 16 * steps)  # fmt: skip
            else:
                _one_plane(scratch, zero_of(halves), scales + offset, data, panel, out, place, 16 * steps)


@kernel
def _one_plane(levels, zero, scales, data, panel, out, place, rows):
    """Four columns of 128 rows."""
    for step in range(8):
        scale = bf16_to_f32(load_i16x16(data, scales + 32 * step))
        codes = load_u8x64(levels, 1024 * step + 64 * panel)
        for column in range(4):
            store_as(out, place + column * rows + 16 * step, _value(codes, column, zero, scale))


@kernel
def _two_planes(levels, zero, scales, second, other_zero, other_scales, data, panel, out, place, rows):
    for step in range(8):
        scale = bf16_to_f32(load_i16x16(data, scales + 32 * step))
        other = bf16_to_f32(load_i16x16(data, other_scales + 32 * step))
        codes = load_u8x64(levels, 1024 * step + 64 * panel)
        others = load_u8x64(second, 1024 * step + 64 * panel)
        for column in range(4):
            value = add_f32(_value(codes, column, zero, scale), _value(others, column, other_zero, other))
            store_as(out, place + column * rows + 16 * step, value)


# --- between the products --------------------------------------------------------------------------------------------


@njit(parallel=True, cache=True, nogil=True)
def _prepare(x, tokens, sign, out):
    """out[i] = x[tokens[i]], rotated if there are signs."""
    for i in prange(len(tokens)):
        row = x[tokens[i]]
        if sign.size:
            rotated = np.empty(row.size, np.float32)
            rotate_row(row, sign, rotated, row.size & -row.size)
            _copy(rotated, out[i])
        else:
            _copy(row, out[i])


@kernel
def _copy(row, out):
    for at in range(0, row.size, 16):
        store_as(out, at, load_f32x16(row, 4 * at))


@njit(parallel=True, cache=True, nogil=True)
def _activate(products, inner, first):
    """inner fp32 [n, from column `first`] = SwiGLU of products [n, rows], sixteen of gate and sixteen of up in turn."""
    columns = min(products.shape[1] // 2, inner.shape[1] - first)
    for i in prange(len(products)):
        _activate_row(products[i], inner[i, first : first + columns])


@kernel
def _activate_row(products, out):
    for at in range(0, out.size, 16):
        store_f32x16(out, 4 * at, swiglu_lanes(load_as(products, 2 * at), load_as(products, 2 * at + 16)))


@njit(parallel=True, cache=True, nogil=True)
def _accumulate(products, tokens, weights, y, first):
    """y[tokens, from column `first`] += weights * products [n, rows]."""
    columns = min(products.shape[1], y.shape[1] - first)
    for i in prange(len(tokens)):
        _accumulate_row(products[i], weights[i], y[tokens[i], first : first + columns])


@kernel
def _accumulate_row(products, weight, out):
    factor = splat_f32(weight)
    for at in range(0, out.size, 16):
        store_f32x16(out, 4 * at, add_f32(load_f32x16(out, 4 * at), mul_f32(factor, load_as(products, at))))
