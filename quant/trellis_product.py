"""Sixteen rows at a time: one slab of a trellis plane times one token, or times many.

For one token the sums of eight steps stay in registers over the sixteen panels of a tile, next to the decoding. For
many, a block is decoded once into 8 KB of scratch and multiplied from there, four tokens and four steps at a time.
Sums are exact integers, so both give the same bits.
"""

import numpy as np

from quant.activations import SPAN
from quant.codes import T10, T15, T20
from quant.simd import (
    add_f32,
    bf16_to_f32,
    broadcast4,
    dot4_small,
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
from quant.trellis_simd import levels_t10, levels_t15, levels_t20, load_nibbles

ROWS = 16 * LONGEST  # of the largest slab
SCRATCH = 8 * PANELS * 64  # bytes of a decoded block
TOKENS = 64  # whose sums are kept at once
HALVES_T20, HALVES_T15 = T20.halves, T15.halves
ZERO_T20, ZERO_T15, ZERO_T10 = T20.zero, T15.zero, T10.zero
STREAM_O = 1024  # where stream o starts in a block
SPAN_TILES = SPAN // COLUMNS


@kernel
def _levels(halves, data, tile, block, blocks, chain, panel):
    """Levels of eight steps of one panel, `block` of the tile at byte `tile`; what follows may be the next panel's."""
    size, mask = 512 * halves, chain - 1
    next_block, turn = _following(block, 0, blocks)
    here, there = tile + block * size, tile + next_block * size
    after = (panel & ~mask) | ((panel + turn) & mask)
    e, e1 = load_u8x64(data, here + 64 * panel), load_u8x64(data, there + 64 * after)
    if halves == HALVES_T20:
        o = load_u8x64(data, here + STREAM_O + 64 * panel)
        return levels_t20(e, e1, o, load_u8x64(data, there + STREAM_O + 64 * after))
    if halves == HALVES_T15:
        return levels_t15(e, e1, load_nibbles(data, here + STREAM_O + 32 * panel, there + STREAM_O + 32 * after))
    next_block, turn = _following(next_block, turn, blocks)
    after = (panel & ~mask) | ((panel + turn) & mask)
    return levels_t10(e, e1, load_u8x64(data, tile + next_block * size + 64 * after))


@kernel
def _following(block, turn, blocks):
    """The block after `block`, and how many panels further on it is."""
    if block + 1 == blocks:
        return 0, turn + 1
    return block + 1, turn


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


@kernel
def _add_one(halves, data, tile, blocks, chain, x, column, sums):
    """sums int32 [16 * steps] += one tile times columns column.. of x int8."""
    for block in range(blocks):
        s = _load8(sums, 512 * block)
        for panel in range(PANELS):
            levels = _levels(halves, data, tile, block, blocks, chain, panel)
            s = _dot8(s, levels, broadcast4(x, column + 4 * panel))
        _store8(sums, 512 * block, s)


# --- many tokens -----------------------------------------------------------------------------------------------------


@kernel
def _decode(halves, data, tile, block, blocks, chain, scratch):
    """One block as bytes [8 steps, 16 panels, 64 lanes]."""
    for panel in range(PANELS):
        levels = _levels(halves, data, tile, block, blocks, chain, panel)
        for step in range(8):
            store_u8x64(scratch, 1024 * step + 64 * panel, levels[step])


@kernel
def _dot_each(s, w, a, b, c, d):
    return dot4_small(s[0], w, a), dot4_small(s[1], w, b), dot4_small(s[2], w, c), dot4_small(s[3], w, d)


@kernel
def _load4(a, b, c, d, at):
    return load_i32x16(a, at), load_i32x16(b, at), load_i32x16(c, at), load_i32x16(d, at)


@kernel
def _store4(a, b, c, d, at, s):
    store_i32x16(a, at, s[0])
    store_i32x16(b, at, s[1])
    store_i32x16(c, at, s[2])
    store_i32x16(d, at, s[3])


@kernel
def _four_by_four(scratch, step, values, places, first, column, sums, token, at):
    """Four steps of a decoded block for tokens token..token + 3 of this pass."""
    a, b, c, d = sums[token], sums[token + 1], sums[token + 2], sums[token + 3]
    xa, xb = values[places[first]], values[places[first + 1]]
    xc, xd = values[places[first + 2]], values[places[first + 3]]
    p, q = _load4(a, b, c, d, at), _load4(a, b, c, d, at + 64)
    r, s = _load4(a, b, c, d, at + 128), _load4(a, b, c, d, at + 192)
    for panel in range(PANELS):
        line, k = 1024 * step + 64 * panel, column + 4 * panel
        i, j, m, n = broadcast4(xa, k), broadcast4(xb, k), broadcast4(xc, k), broadcast4(xd, k)
        p = _dot_each(p, load_u8x64(scratch, line), i, j, m, n)
        q = _dot_each(q, load_u8x64(scratch, line + 1024), i, j, m, n)
        r = _dot_each(r, load_u8x64(scratch, line + 2048), i, j, m, n)
        s = _dot_each(s, load_u8x64(scratch, line + 3072), i, j, m, n)
    _store4(a, b, c, d, at, p)
    _store4(a, b, c, d, at + 64, q)
    _store4(a, b, c, d, at + 128, r)
    _store4(a, b, c, d, at + 192, s)


@kernel
def _eight_by_one(scratch, x, column, sums, at):
    """All steps of a decoded block for one token."""
    s = _load8(sums, at)
    for panel in range(PANELS):
        line = 64 * panel
        w0, w1 = load_u8x64(scratch, line), load_u8x64(scratch, line + 1024)
        w2, w3 = load_u8x64(scratch, line + 2048), load_u8x64(scratch, line + 3072)
        w4, w5 = load_u8x64(scratch, line + 4096), load_u8x64(scratch, line + 5120)
        w6, w7 = load_u8x64(scratch, line + 6144), load_u8x64(scratch, line + 7168)
        s = _dot8(s, (w0, w1, w2, w3, w4, w5, w6, w7), broadcast4(x, column + 4 * panel))
    _store8(sums, at, s)


@kernel
def _add_many(halves, data, tile, blocks, chain, values, places, first, count, column, sums, scratch):
    """The same as `_add_one` for tokens places[first..first + count], into sums[0..count]."""
    quads = count // 4 * 4
    for block in range(blocks):
        _decode(halves, data, tile, block, blocks, chain, scratch)
        for token in range(0, quads, 4):
            _four_by_four(scratch, 0, values, places, first + token, column, sums, token, 512 * block)
            _four_by_four(scratch, 4, values, places, first + token, column, sums, token, 512 * block + 256)
        for token in range(quads, count):
            _eight_by_one(scratch, values[places[first + token]], column, sums[token], 512 * block)


# --- a span ----------------------------------------------------------------------------------------------------------


@kernel
def add_span(halves, data, bits, steps, chain, tiles, span, values, places, first, count, sums, scratch):
    """sums int32 [count, 16 * steps] = one span of columns of the slab at byte `bits`, for `count` <= TOKENS tokens.

    values int8 [rows, columns padded]; token i is row places[first + i].
    """
    blocks = steps // 8
    for token in range(count):
        sums[token, : 16 * steps] = 0
    for tile in range(SPAN_TILES * span, min(SPAN_TILES * (span + 1), tiles)):
        at = bits + tile * blocks * 512 * halves
        if count == 1:
            _add_one(halves, data, at, blocks, chain, values[places[first]], COLUMNS * tile, sums[0])
        else:
            _add_many(halves, data, at, blocks, chain, values, places, first, count, COLUMNS * tile, sums, scratch)


@kernel
def zero_of(halves):
    if halves == HALVES_T20:
        return ZERO_T20
    return ZERO_T15 if halves == HALVES_T15 else ZERO_T10


@kernel
def deliver(sums, steps, data, scales, less, factor, out, at, more):
    """out fp32, from element `at`, = or += (sums - less) * (row scale * factor); the bf16 scales are in `data`."""
    for group in range(steps):
        exact = to_f32(sub_i32(load_i32x16(sums, 64 * group), splat_i32(np.int32(less))))
        scale = mul_f32(bf16_to_f32(load_i16x16(data, scales + 32 * group)), splat_f32(factor))
        product, place = mul_f32(exact, scale), 4 * at + 64 * group
        if more:
            product = add_f32(load_f32x16(out, place), product)
        store_f32x16(out, place, product)
