"""Sixteen rows at a time: one slab of a trellis plane times one token, or times many.

For one token the sums of eight steps stay in registers over the sixteen panels of a tile, next to the decoding. For
many, a block is decoded once into 8 KB of scratch and multiplied from there, four tokens and four steps at a time.
Sums are exact integers, so both give the same bits.
"""

import numpy as np

from quant import trellis_narrow as narrow
from quant.activations import SPAN
from quant.codes import T10, T15, T20
from quant.cpu import ISA
from quant.dots import dot4_small
from quant.simd import (
    add_f32,
    bf16_to_f32,
    broadcast4,
    kernel,
    load_f32x16,
    load_i16x16,
    load_i32x16,
    load_u8x64,
    mul_f32,
    splat_f32,
    splat_i32,
    store_f32x16,
    store_i32x16,
    store_u8x64,
    sub_i32,
    to_f32,
)
from quant.trellis import COLUMNS, LONGEST, PANELS
from quant.trellis_lines import STEPS_T10, STEPS_T15, STEPS_T20

ROWS = 16 * LONGEST  # of the largest slab
NARROW = ISA in ("avx2", "avxvnni")
ROW = 4 * ROWS  # bytes of one token's sums
SCRATCH = 8 * PANELS * 64  # bytes of a decoded block
TOKENS = 64  # whose sums are kept at once
HALVES_T20, HALVES_T15 = T20.halves, T15.halves
ZERO_T20, ZERO_T15, ZERO_T10 = T20.zero, T15.zero, T10.zero
SPAN_TILES = SPAN // COLUMNS


# --- one token -------------------------------------------------------------------------------------------------------


@kernel
def _load8(sums, at):
    a, b = load_i32x16(sums, at), load_i32x16(sums, at + 64)
    c, d = load_i32x16(sums, at + 128), load_i32x16(sums, at + 192)
    e, f = load_i32x16(sums, at + 256), load_i32x16(sums, at + 320)
    return a, b, c, d, e, f, load_i32x16(sums, at + 384), load_i32x16(sums, at + 448)


@kernel
def _dot8(s, w, x):
    a, b, c, d = _dot4((s[0], s[1], s[2], s[3]), (w[0], w[1], w[2], w[3]), x)
    e, f, g, h = _dot4((s[4], s[5], s[6], s[7]), (w[4], w[5], w[6], w[7]), x)
    return a, b, c, d, e, f, g, h


@kernel
def _dot4(s, w, x):
    return dot4_small(s[0], w[0], x), dot4_small(s[1], w[1], x), dot4_small(s[2], w[2], x), dot4_small(s[3], w[3], x)


@kernel
def _store8(sums, at, s):
    for i in range(8):
        store_i32x16(sums, at + 64 * i, s[i])


def _one(code):
    where, whole, levels = code.at, code.whole, code.levels

    @kernel
    def add_one(data, tile, blocks, chain, values, x, sums):
        """sums int32 [16 * steps] += one tile times the int8 values from byte x on."""
        for block in range(blocks):
            s = _load8(sums, 512 * block)
            for panel in range(PANELS):
                lines = whole(data, where(data, tile, block, blocks, chain, panel))
                s = _dot8(s, levels(*lines), broadcast4(values, x + 4 * panel))
            _store8(sums, 512 * block, s)

    return add_one


# --- many tokens -----------------------------------------------------------------------------------------------------


@kernel
def _dot_each(s, w, a, b, c, d):
    return dot4_small(s[0], w, a), dot4_small(s[1], w, b), dot4_small(s[2], w, c), dot4_small(s[3], w, d)


@kernel
def _load4(sums, at):
    """The same sixteen rows of four tokens."""
    a, b = load_i32x16(sums, at), load_i32x16(sums, at + ROW)
    return a, b, load_i32x16(sums, at + 2 * ROW), load_i32x16(sums, at + 3 * ROW)


@kernel
def _store4(sums, at, s):
    for i in range(4):
        store_i32x16(sums, at + ROW * i, s[i])


@kernel
def _four_by_four(scratch, line, values, xs, sums, at):
    """Four steps of a decoded block for four tokens, whose x begin at bytes xs of values."""
    p, q, r, s = _load4(sums, at), _load4(sums, at + 64), _load4(sums, at + 128), _load4(sums, at + 192)
    for panel in range(PANELS):
        w, k = line + 64 * panel, 4 * panel
        i, j = broadcast4(values, xs[0] + k), broadcast4(values, xs[1] + k)
        m, n = broadcast4(values, xs[2] + k), broadcast4(values, xs[3] + k)
        p = _dot_each(p, load_u8x64(scratch, w), i, j, m, n)
        q = _dot_each(q, load_u8x64(scratch, w + 1024), i, j, m, n)
        r = _dot_each(r, load_u8x64(scratch, w + 2048), i, j, m, n)
        s = _dot_each(s, load_u8x64(scratch, w + 3072), i, j, m, n)
    _store4(sums, at, p)
    _store4(sums, at + 64, q)
    _store4(sums, at + 128, r)
    _store4(sums, at + 192, s)


@kernel
def _eight_by_one(scratch, values, x, sums, at):
    """All steps of a decoded block for one token, whose x begins at byte x of values."""
    s = _load8(sums, at)
    for panel in range(PANELS):
        line = 64 * panel
        w0, w1 = load_u8x64(scratch, line), load_u8x64(scratch, line + 1024)
        w2, w3 = load_u8x64(scratch, line + 2048), load_u8x64(scratch, line + 3072)
        w4, w5 = load_u8x64(scratch, line + 4096), load_u8x64(scratch, line + 5120)
        w6, w7 = load_u8x64(scratch, line + 6144), load_u8x64(scratch, line + 7168)
        s = _dot8(s, (w0, w1, w2, w3, w4, w5, w6, w7), broadcast4(values, x + 4 * panel))
    _store8(sums, at, s)


def _block(code):
    where, whole, levels = code.at, code.whole, code.levels

    @kernel
    def decode_block(data, tile, block, blocks, chain, scratch):
        """scratch uint8 [SCRATCH] = the levels of a block, step after step, panel after panel."""
        for panel in range(PANELS):
            found = levels(*whole(data, where(data, tile, block, blocks, chain, panel)))
            for step in range(8):
                store_u8x64(scratch, 1024 * step + 64 * panel, found[step])

    return decode_block


def _many(decode_block):
    @kernel
    def add_many(data, tile, blocks, chain, values, offsets, column, sums, scratch):
        """The same for as many tokens as there are offsets, of the first byte of each in the flat `values`."""
        quads = offsets.size // 4 * 4
        for block in range(blocks):
            decode_block(data, tile, block, blocks, chain, scratch)
            for i in range(0, quads, 4):
                a, b, at = column + offsets[i], column + offsets[i + 1], ROW * i + 512 * block
                xs = a, b, column + offsets[i + 2], column + offsets[i + 3]
                _four_by_four(scratch, 0, values, xs, sums, at)
                _four_by_four(scratch, 4096, values, xs, sums, at + 256)
            for i in range(quads, offsets.size):
                _eight_by_one(scratch, values, column + offsets[i], sums, ROW * i + 512 * block)

    return add_many


one, block, many = (narrow.one, narrow.block, narrow.many) if NARROW else (_one, _block, _many)
_one_t20, _one_t15, _one_t10 = one(STEPS_T20), one(STEPS_T15), one(STEPS_T10)
_block_t20, _block_t15, _block_t10 = block(STEPS_T20), block(STEPS_T15), block(STEPS_T10)
_many_t20, _many_t15, _many_t10 = many(_block_t20), many(_block_t15), many(_block_t10)


@kernel
def decode_block(halves, data, tile, block, blocks, chain, scratch):
    """Levels of eight steps, block `block` of the tile at byte `tile`, into scratch uint8 [SCRATCH]."""
    if halves == HALVES_T20:
        _block_t20(data, tile, block, blocks, chain, scratch)
    elif halves == HALVES_T15:
        _block_t15(data, tile, block, blocks, chain, scratch)
    else:
        _block_t10(data, tile, block, blocks, chain, scratch)


# --- a span ----------------------------------------------------------------------------------------------------------


@kernel
def add_span(halves, data, bits, steps, chain, tiles, span, values, offsets, sums, scratch):
    """sums int32 [tokens, ROWS], flat, = one span of columns of the slab at byte `bits`, for up to TOKENS tokens.

    values int8, flat; offsets int64, where each token's row of it begins.
    """
    for token in range(offsets.size):
        sums[ROWS * token : ROWS * token + 16 * steps] = 0
    for tile in range(SPAN_TILES * span, min(SPAN_TILES * (span + 1), tiles)):
        at, column = bits + tile * steps * 64 * halves, COLUMNS * tile
        if offsets.size > 1:
            _tile_many(halves, data, at, steps // 8, chain, values, offsets, column, sums, scratch)
        else:
            _tile_one(halves, data, at, steps // 8, chain, values, column + offsets[0], sums)


@kernel
def _tile_one(halves, data, tile, blocks, chain, values, x, sums):
    if halves == HALVES_T20:
        _one_t20(data, tile, blocks, chain, values, x, sums)
    elif halves == HALVES_T15:
        _one_t15(data, tile, blocks, chain, values, x, sums)
    else:
        _one_t10(data, tile, blocks, chain, values, x, sums)


@kernel
def _tile_many(halves, data, tile, blocks, chain, values, offsets, column, sums, scratch):
    if halves == HALVES_T20:
        _many_t20(data, tile, blocks, chain, values, offsets, column, sums, scratch)
    elif halves == HALVES_T15:
        _many_t15(data, tile, blocks, chain, values, offsets, column, sums, scratch)
    else:
        _many_t10(data, tile, blocks, chain, values, offsets, column, sums, scratch)


@kernel
def zero_of(halves):
    if halves == HALVES_T20:
        return ZERO_T20
    return ZERO_T15 if halves == HALVES_T15 else ZERO_T10


@kernel
def deliver(sums, token, steps, data, scales, less, factor, out, at, more):
    """out fp32, from element `at`, = or += (sums - less) * (row scale * factor); the bf16 scales are in `data`."""
    for group in range(steps):
        exact = to_f32(sub_i32(load_i32x16(sums, ROW * token + 64 * group), splat_i32(np.int32(less))))
        scale = mul_f32(bf16_to_f32(load_i16x16(data, scales + 32 * group)), splat_f32(factor))
        product, place = mul_f32(exact, scale), 4 * at + 64 * group
        if more:
            product = add_f32(load_f32x16(out, place), product)
        store_f32x16(out, place, product)
