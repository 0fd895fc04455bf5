"""`int8_g32`: 8-bit integers in groups of 32 with a bf16 scale (8.5 bits per weight), for weights every token reads.

As stored, a row is int8 codes q in -127..127 and W = q * scale. The kernels want rows side by side in one unbroken
stream, for the reasons int4_g32 gives, and codes without a sign; `pack` reorders without loss and `unpack` undoes it.

    blocks uint8 [matrices, rows / 32, columns / 32, 1088]
    the last axis is a block of 32 rows x 32 columns in seventeen cache lines:
      8 x 128 bytes of codes: pair of lines j holds columns 4j..4j+3; byte 4r+c of it is row r, column 4j+c, as q + 128
      64 bytes of scales:     bf16 for the 32 rows
"""

from typing import NamedTuple

import numpy as np

from quant import aligned, int4_g32
from quant.activations import Activations
from quant.cpu import ISA
from quant.dots import abs_i8, dot4, dot4_small, flip_sign, sign_i8
from quant.scales import from_bits, to_bits
from quant.simd import (
    add_f32,
    bf16_to_f32,
    broadcast4,
    constant,
    high_nibbles_down,
    kernel,
    load_i16x16,
    load_u8x64,
    low_nibbles,
    mul_f32,
    operation,
    splat_f32,
    splat_i32,
    store_i16x16,
    store_u8x64,
    to_f32,
    u8x64,
)

BITS_PER_WEIGHT = 8.5
ROWS, COLUMNS, CODES = 32, 32, 1024  # of a block; bytes of its codes
BLOCK = CODES + 2 * ROWS
ZERO = 128  # the packed code of a zero weight
LARGEST = 127
# Tokens from which on it pays to widen an INT4 tile, in the cache, and use it four tokens at a time. On AVX2, where
# signed bytes take more instructions and registers than nibbles, never.
WIDEN = 1 << 30 if ISA == "avx2" else 8
ZEROS = np.uint32(0x80808080)


class Int8G32(NamedTuple):
    """A stack of equally shaped matrices."""

    blocks: np.ndarray  # uint8 [matrices, rows / 32, columns / 32, 1088]


def empty(matrices: int, rows: int, columns: int) -> Int8G32:
    """Room for `matrices` of `rows` x `columns` (multiples of 32), filled by `pack`."""
    assert rows % ROWS == 0 and columns % COLUMNS == 0, (rows, columns)
    return Int8G32(aligned.empty((matrices, rows // ROWS, columns // COLUMNS, BLOCK)))


def encode(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [rows, columns], columns a multiple of 32 -> codes int8 [rows, columns] and scales, the bits of bf16, uint16
    [rows, columns / 32], by largest magnitude / 127."""
    rows, columns = weights.shape
    groups = weights.reshape(rows, columns // COLUMNS, COLUMNS)
    bits = to_bits(np.abs(groups).max(axis=2) / np.float32(LARGEST))
    steps = from_bits(bits)[:, :, None]
    codes = np.divide(groups, steps, out=np.zeros_like(groups), where=steps > 0)
    return np.rint(codes).clip(-LARGEST, LARGEST).astype(np.int8).reshape(rows, columns), bits


def pack(codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Reorder one matrix, codes int8 [rows, columns] and scales uint16 [rows, columns / 32], into `out` = blocks[i]."""
    tiles, groups = out.shape[:2]
    words = codes.view(np.uint32).reshape(tiles, ROWS, groups, 8)  # of four columns
    np.bitwise_xor(words.transpose(0, 2, 3, 1), ZEROS, out=_words(out))
    out[..., CODES:].view(np.uint16)[:] = scales.reshape(tiles, ROWS, groups).transpose(0, 2, 1)


def unpack(blocks: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack` for one matrix, blocks[i]: (codes int8, scales uint16)."""
    tiles, groups = blocks.shape[:2]
    assert columns == groups * COLUMNS
    words = (_words(blocks) ^ ZEROS).transpose(0, 3, 1, 2).reshape(tiles * ROWS, groups * 8)
    bits = blocks[..., CODES:].view(np.uint16).transpose(0, 2, 1).reshape(tiles * ROWS, groups)
    return np.ascontiguousarray(words).view(np.int8), bits


def _words(blocks: np.ndarray) -> np.ndarray:
    """The codes of one matrix, four columns to a word: uint32 [rows / 32, columns / 32, 8, 32]."""
    return blocks[..., :CODES].view(np.uint32).reshape(*blocks.shape[:2], 8, ROWS)


def decode(blocks: np.ndarray, columns: int) -> np.ndarray:
    """The meaning of one matrix's bytes: fp32 [rows, columns], W = q * scale."""
    codes, bits = unpack(blocks, columns)
    with np.errstate(invalid="ignore"):  # a damaged scale gives NaN, which is reported where it can be explained
        return codes.astype(np.float32) * np.repeat(from_bits(bits), COLUMNS, axis=1)


def multiply(blocks: np.ndarray, x: Activations) -> np.ndarray:
    """What the kernels compute, bit for bit, in NumPy: fp32 [tokens, rows] of one matrix times int8 activations."""
    codes, bits = unpack(blocks, blocks.shape[1] * COLUMNS)
    return int4_g32.multiply_codes(codes.astype(np.int32), bits, x)


# --- the tile product: thirty-two rows at a time -------------------------------------------------------------------
# A group's sums start where unsigned codes need it: sum of (q + 128) x - 128 * sum of x. AVX2 multiplies with signs.


@kernel
def _start_unsigned(total):
    return splat_i32(np.int32(-ZERO * total))


@kernel
def _start_signed(total):
    return splat_i32(np.int32(0))


@kernel
def _advance_unsigned(sums, codes, x):
    return dot4(sums, codes, x)


@kernel
def _advance_signed(sums, codes, x):
    weights = flip_sign(codes)
    return dot4_small(sums, abs_i8(weights), sign_i8(x, weights))  # two products, at most 128 * 127 each, fit 16 bits


_start, _advance = (_start_signed, _advance_signed) if ISA == "avx2" else (_start_unsigned, _advance_unsigned)


@kernel
def _scales(blocks, block, half):
    return bf16_to_f32(load_i16x16(blocks, block + CODES + 32 * half))


@kernel
def _add(total, sums, step, scale):
    return add_f32(total, mul_f32(to_f32(sums), mul_f32(step, splat_f32(scale))))


@kernel
def dot_tile(blocks, offset, groups, x):
    """Thirty-two rows, `groups` blocks from byte `offset` of flat `blocks`, times one token (a `Row`): two f32x16."""
    low = splat_f32(np.float32(0))
    high = low
    for group in range(groups):
        block = offset + BLOCK * group
        first = _start(x.sums[group])
        second = first
        for pair in range(8):
            values = broadcast4(x.values, COLUMNS * group + 4 * pair)
            first = _advance(first, load_u8x64(blocks, block + 128 * pair), values)
            second = _advance(second, load_u8x64(blocks, block + 128 * pair + 64), values)
        low = _add(low, first, _scales(blocks, block, 0), x.scales[group])
        high = _add(high, second, _scales(blocks, block, 1), x.scales[group])
    return low, high


# --- the same for four tokens at once, which use every load of weights four times ------------------------------------


@kernel
def dot_tile4(blocks, offset, groups, tokens):
    """`dot_tile` for four tokens, each a `Row`: four f32x16 of the first sixteen rows, four of the others."""
    zero = splat_f32(np.float32(0))
    low = zero, zero, zero, zero
    high = low
    for group in range(groups):
        block = offset + BLOCK * group
        first = _start4(tokens, group)
        second = first
        for pair in range(8):
            values = _broadcast4x4(tokens, COLUMNS * group + 4 * pair)
            first = _advance4(first, load_u8x64(blocks, block + 128 * pair), values)
            second = _advance4(second, load_u8x64(blocks, block + 128 * pair + 64), values)
        low = _add4(low, first, _scales(blocks, block, 0), tokens, group)
        high = _add4(high, second, _scales(blocks, block, 1), tokens, group)
    return low, high


@kernel
def _start4(tokens, group):
    a, b, c, d = tokens
    return _start(a.sums[group]), _start(b.sums[group]), _start(c.sums[group]), _start(d.sums[group])


@kernel
def _broadcast4x4(tokens, column):
    a, b, c, d = tokens
    return (
        broadcast4(a.values, column),
        broadcast4(b.values, column),
        broadcast4(c.values, column),
        broadcast4(d.values, column),
    )


@kernel
def _advance4(sums, codes, values):
    a, b, c, d = sums
    p, q, r, s = values
    return _advance(a, codes, p), _advance(b, codes, q), _advance(c, codes, r), _advance(d, codes, s)


@kernel
def _add4(totals, sums, step, tokens, group):
    a, b, c, d = totals
    p, q, r, s = tokens
    return (
        _add(a, sums[0], step, p.scales[group]),
        _add(b, sums[1], step, q.scales[group]),
        _add(c, sums[2], step, r.scales[group]),
        _add(d, sums[3], step, s.scales[group]),
    )


# --- INT4 tiles as int8: worth it where a tile meets many tokens -----------------------------------------------------

_to_code = operation(u8x64, (u8x64,), lambda b, x: b.add(x, constant(u8x64.ir, ZERO - int4_g32.ZERO)))


def widened_bytes(wide: int) -> int:
    """Of an INT4 tile of `wide` blocks as this format stores it."""
    return 2 * wide * BLOCK


@kernel
def widen(blocks, offset, wide, out):
    """Write to `out` the tile of int4_g32, `wide` blocks from byte `offset`, as this format stores the same weights."""
    for half_block in range(2 * wide):
        source, half = offset + int4_g32.HALF * half_block, half_block % 2
        for group in range(2):
            target = BLOCK * (half_block // 2 * 2 + group)
            for line in range(4):
                codes = load_u8x64(blocks, source + 256 * group + 64 * line)
                store_u8x64(out, target + 256 * line + 64 * half, _to_code(low_nibbles(codes)))
                store_u8x64(out, target + 256 * line + 64 * half + 128, _to_code(high_nibbles_down(codes)))
            scales = load_i16x16(blocks, source + 512 + 32 * group)
            store_i16x16(out, target + CODES + 32 * half, scales)
