"""`int4_g32`: Kimi K2.5's released format, 4-bit integers in groups of 32 with a bf16 scale (4.5 bits per weight).

As released, a row stores two weights per byte, low nibble first, each as u = q + 8, and W = q * scale. The kernels
want another order of the same bits: rows side by side, so that one vector instruction advances sixteen independent dot
products and nothing is ever summed across lanes, and every matrix one unbroken stream, which memory serves fastest.
`pack` reorders without loss and `unpack` undoes it.

    blocks uint8 [experts, rows / 32, columns / 64, 2, 576]
    the last two axes are a block of 32 rows x 64 columns, each half of it sixteen rows in nine cache lines:
      8 x 64 bytes of codes: line j holds columns 8j..8j+7; byte 4r+c of it is row r,
                             low nibble column 8j+c, high nibble column 8j+4+c
      64 bytes of scales:    bf16 for sixteen rows of the first 32 columns, then of the second 32
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from quant import aligned
from quant.activations import Activations
from quant.cpu import ISA
from quant.dots import dot4, pairs_i8, pairs_i16
from quant.scales import from_bits, search
from quant.simd import (
    add_f32,
    add_i16,
    add_i32,
    bf16_to_f32,
    broadcast4,
    eightfold,
    high_nibbles,
    high_nibbles_down,
    inlined,
    kernel,
    load_i16x16,
    load_u8x64,
    low_nibbles,
    mul_f32,
    sixteenth,
    splat_f32,
    splat_i32,
    sub_i32,
    to_f32,
)

BITS_PER_WEIGHT = 4.5
ROWS, COLUMNS, HALF = 32, 64, 576  # of a block; a half block is sixteen rows
BLOCK = 2 * HALF
ZERO = 8  # the stored code of a zero weight


class Int4G32(NamedTuple):
    """A stack of equally shaped matrices, one per expert."""

    blocks: np.ndarray  # uint8 [experts, rows / 32, columns / 64 rounded up, 2, 576]


def empty(experts: int, rows: int, columns: int) -> Int4G32:
    """Room for `experts` matrices of `rows` x `columns` (multiples of 32), filled by `pack`."""
    assert rows % ROWS == 0 and columns % 32 == 0, (rows, columns)
    return Int4G32(aligned.empty((experts, rows // ROWS, -(-columns // COLUMNS), 2, HALF)))


def encode(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [rows, columns], columns a multiple of 32 -> (packed uint8 [rows, columns / 2], scales uint16) as released.

    Each group gets the scale that leaves the least squared error, out of nineteen.
    """
    rows, columns = weights.shape
    groups = weights.reshape(-1, 32)
    bits = search(groups, np.ones((1, 32), np.float32))
    codes = np.rint(groups / from_bits(bits)[:, None]).clip(-ZERO, 7).astype(np.int8)
    stored = (codes + ZERO).view(np.uint8).reshape(rows, columns)
    return stored[:, 0::2] | stored[:, 1::2] << 4, bits.reshape(rows, columns // 32)


def pack(packed: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Reorder one released matrix into `out` = blocks[e].

    packed uint8 [rows, columns / 2]; scales uint16, the bits of bf16 [rows, columns / 32]. Columns beyond the matrix,
    when their number is an odd multiple of 32, become zero weights.
    """
    columns, wide = 2 * packed.shape[1], out.shape[1] * COLUMNS
    if columns < wide:
        packed = np.pad(packed, ((0, 0), (0, (wide - columns) // 2)), constant_values=ZERO * 0x11)
        scales = np.pad(scales, ((0, 0), (0, (wide - columns) // 32)))
    _pack(packed, scales, out)


@njit(cache=True, nogil=True)
def _pack(packed, scales, out):
    for row in range(packed.shape[0]):
        tile, half, lane = row // ROWS, row % ROWS // 16, row % 16
        for block in range(out.shape[1]):
            target = out[tile, block, half]
            source = packed[row, 32 * block : 32 * block + 32]
            for line in range(8):
                at, to = 4 * line, 64 * line + 4 * lane
                a, b, c, d = source[at], source[at + 1], source[at + 2], source[at + 3]
                target[to] = (a & 15) | (c & 15) << 4
                target[to + 1] = a >> 4 | c & 0xF0
                target[to + 2] = (b & 15) | (d & 15) << 4
                target[to + 3] = b >> 4 | d & 0xF0
            for group in range(2):
                bits = scales[row, 2 * block + group]
                target[512 + 32 * group + 2 * lane] = bits & 255
                target[512 + 32 * group + 2 * lane + 1] = bits >> 8


def unpack(blocks: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack` for one matrix, blocks[e]: (packed uint8, scales uint16) as released."""
    codes, scales = _split(blocks, columns)
    return (codes[:, 0::2] | codes[:, 1::2] << 4), scales


def decode(blocks: np.ndarray, columns: int) -> np.ndarray:
    """The meaning of one matrix's bytes: fp32 [rows, columns], W = (u - 8) * scale; NaN where a scale is damaged."""
    out = np.empty((ROWS * len(blocks), COLUMNS * blocks.shape[1]), np.float32)
    _decode(blocks, np.ascontiguousarray(blocks[..., 512:]).view(np.uint16), out)
    return out if out.shape[1] == columns else np.ascontiguousarray(out[:, :columns])


@njit(cache=True, nogil=True)
def _decode(blocks, scales, out):
    for tile in range(blocks.shape[0]):
        for block in range(blocks.shape[1]):
            for half in range(2):
                for lane in range(16):
                    target = out[ROWS * tile + 16 * half + lane, COLUMNS * block : COLUMNS * (block + 1)]
                    _decode_lane(blocks[tile, block, half], scales[tile, block, half], lane, target)


@njit(inline="always")
def _decode_lane(codes, scales, lane, target):
    """Sixty-four columns of one row."""
    for group in range(2):
        step = np.uint32(np.uint32(scales[16 * group + lane]) << np.uint32(16)).view(np.float32)
        for line in range(4):
            for column in range(4):
                byte = codes[256 * group + 64 * line + 4 * lane + column]
                at = 32 * group + 8 * line + column
                target[at] = np.float32(np.int32(byte & 15) - ZERO) * step
                target[at + 4] = np.float32(np.int32(byte >> 4) - ZERO) * step


def _split(blocks: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [rows, columns] in 0..15 and scales uint16 [rows, columns / 32] of one matrix."""
    tiles, wide = blocks.shape[:2]
    lines = blocks[..., :512].reshape(tiles, wide, 2, 8, 16, 4)
    nibbles = np.stack([lines & 15, lines >> 4], axis=5)  # tile, block, half, line, row, nibble, column in four
    codes = nibbles.transpose(0, 2, 4, 1, 3, 5, 6).reshape(tiles * ROWS, wide * COLUMNS)
    bits = np.ascontiguousarray(blocks[..., 512:]).view(np.uint16).reshape(tiles, wide, 2, 2, 16)
    scales = bits.transpose(0, 2, 4, 1, 3).reshape(tiles * ROWS, wide * 2)
    return codes[:, :columns], scales[:, : columns // 32]


def multiply(blocks: np.ndarray, x: Activations) -> np.ndarray:
    """What the kernels compute, bit for bit, in NumPy: fp32 [tokens, rows] of one matrix times int8 activations."""
    codes, bits = _split(blocks, x.values.shape[1])
    return multiply_codes(codes.astype(np.int32) - ZERO, bits, x)


def multiply_codes(codes: np.ndarray, bits: np.ndarray, x: Activations) -> np.ndarray:
    """The product of every format in groups of 32: codes int32 [rows, columns], scales uint16 [rows, columns / 32].

    Per group the integer dot product is exact; it is then scaled by fl(weight scale * activation scale) and added,
    group after group, in fp32.
    """
    rows, columns = codes.shape
    groups = columns // 32
    values = x.values[:, :columns].astype(np.int32).reshape(-1, groups, 32)
    dots = np.einsum("rgk,tgk->gtr", codes.reshape(rows, groups, 32), values).astype(np.float32)
    steps = from_bits(bits)
    y = np.zeros((len(values), rows), np.float32)
    for g in range(groups):
        y += dots[g] * (steps[:, g] * x.scales[:, g, None])
    return y


# --- the tile product: thirty-two rows at a time -------------------------------------------------------------------
# No software prefetch: on Zen 4 every distance and hint tried was slower than what the hardware fetches by itself.


@kernel
def _dot_group_vnni(blocks, offset, values, column):
    low, high = splat_i32(np.int32(0)), splat_i32(np.int32(0))
    for line in range(4):
        codes = load_u8x64(blocks, offset + 64 * line)
        low = dot4(low, low_nibbles(codes), broadcast4(values, column + 8 * line))
        high = dot4(high, high_nibbles(codes), broadcast4(values, column + 8 * line + 4))
    return add_i32(low, sixteenth(high))


@kernel
def _dot_group_avx2(blocks, offset, values, column):
    codes = load_u8x64(blocks, offset)
    total = pairs_i8(low_nibbles(codes), broadcast4(values, column))
    total = add_i16(total, pairs_i8(high_nibbles_down(codes), broadcast4(values, column + 4)))
    for line in range(1, 4):  # eight sums of at most 2 * 15 * 127 stay within 16 bits
        codes = load_u8x64(blocks, offset + 64 * line)
        total = add_i16(total, pairs_i8(low_nibbles(codes), broadcast4(values, column + 8 * line)))
        total = add_i16(total, pairs_i8(high_nibbles_down(codes), broadcast4(values, column + 8 * line + 4)))
    return pairs_i16(total)


_dot_group = _dot_group_avx2 if ISA == "avx2" else _dot_group_vnni


@kernel
def _scales(blocks, half_block, group):
    return bf16_to_f32(load_i16x16(blocks, half_block + 512 + 32 * group))


@kernel
def _add_group(total, step, blocks, codes, x, group):
    return _add_dot(total, _dot_group(blocks, codes, x.values, 32 * group), step, x, group)


@kernel
def _add_dot(total, dot, step, x, group):
    exact = sub_i32(dot, eightfold(splat_i32(x.sums[group])))  # codes are stored as q + 8
    return add_f32(total, mul_f32(to_f32(exact), mul_f32(step, splat_f32(x.scales[group]))))


@kernel
def _add_half(total, blocks, half_block, x, index):
    """Sixteen rows times 64 columns, block `index` of a tile."""
    total = _add_group(total, _scales(blocks, half_block, 0), blocks, half_block, x, 2 * index)
    return _add_group(total, _scales(blocks, half_block, 1), blocks, half_block + 256, x, 2 * index + 1)


@kernel
def dot_tile(blocks, offset, wide, x):
    """Thirty-two rows, `wide` blocks from byte `offset` of the flat `blocks`, times one token (a `Row`): two f32x16."""
    low = splat_f32(np.float32(0))
    high = low
    for index in range(wide):
        block = offset + BLOCK * index
        low = _add_half(low, blocks, block, x, index)
        high = _add_half(high, blocks, block + HALF, x, index)
    return low, high


# --- the same for two tokens, which share every load and every nibble ------------------------------------------------


@kernel
def _dot_groups_vnni(blocks, offset, first, second, column):
    zero = splat_i32(np.int32(0))
    low, high, low2, high2 = zero, zero, zero, zero
    for line in range(4):
        codes, at = load_u8x64(blocks, offset + 64 * line), column + 8 * line
        even, odd = low_nibbles(codes), high_nibbles(codes)
        low, high = dot4(low, even, broadcast4(first, at)), dot4(high, odd, broadcast4(first, at + 4))
        low2, high2 = dot4(low2, even, broadcast4(second, at)), dot4(high2, odd, broadcast4(second, at + 4))
    return add_i32(low, sixteenth(high)), add_i32(low2, sixteenth(high2))


@kernel
def _dot_groups_avx2(blocks, offset, first, second, column):
    codes = load_u8x64(blocks, offset)
    even, odd = low_nibbles(codes), high_nibbles_down(codes)
    total, total2 = _pairs(even, odd, first, column), _pairs(even, odd, second, column)
    for line in range(1, 4):
        codes, at = load_u8x64(blocks, offset + 64 * line), column + 8 * line
        even, odd = low_nibbles(codes), high_nibbles_down(codes)
        total = add_i16(total, _pairs(even, odd, first, at))
        total2 = add_i16(total2, _pairs(even, odd, second, at))
    return pairs_i16(total), pairs_i16(total2)


@kernel
def _pairs(even, odd, values, column):
    return add_i16(pairs_i8(even, broadcast4(values, column)), pairs_i8(odd, broadcast4(values, column + 4)))


_dot_groups = _dot_groups_avx2 if ISA == "avx2" else _dot_groups_vnni


@inlined
def _add_halves(total, total2, blocks, half_block, x, y, index):
    """Sixteen rows times 64 columns of both tokens."""
    for group in range(2):
        dot, dot2 = _dot_groups(blocks, half_block + 256 * group, x.values, y.values, COLUMNS * index + 32 * group)
        step, of_row = _scales(blocks, half_block, group), 2 * index + group
        total, total2 = _add_dot(total, dot, step, x, of_row), _add_dot(total2, dot2, step, y, of_row)
    return total, total2


@kernel
def dot_tile2(blocks, offset, wide, x, y):
    """`dot_tile` for two tokens, each a `Row`: two f32x16 of the first, two of the second."""
    low = splat_f32(np.float32(0))
    high, low2, high2 = low, low, low
    for index in range(wide):
        block = offset + BLOCK * index
        low, low2 = _add_halves(low, low2, blocks, block, x, y, index)
        high, high2 = _add_halves(high, high2, blocks, block + HALF, x, y, index)
    return low, high, low2, high2
