"""A tile of a trellis plane times tokens, on machines whose vector registers are sixteen of 256 bits.

Half a line at a time. The sums of eight steps would leave no register for tables and windows, and what the compiler
spills instead costs more than their place in memory does: for one token sums are read and written at every panel. For
many, those of four tokens and two steps are held over the sixteen panels of a decoded block.
"""

from quant.dots import dot4_half
from quant.simd import broadcast4_half, fence, kernel, load_i32x8, load_u8x32, store_i32x8, store_u8x32
from quant.trellis import LONGEST, PANELS

ROW = 4 * 16 * LONGEST  # bytes of one token's sums


def one(code):
    where, first, second, add = code.at, code.first, code.second, code.add

    @kernel
    def add_one(data, tile, blocks, chain, values, x, sums):
        for block in range(blocks):
            for panel in range(PANELS):
                at, four = where(data, tile, block, blocks, chain, panel), broadcast4_half(values, x + 4 * panel)
                add(sums, 512 * block, four, *first(data, at))
                fence()
                add(sums, 512 * block + 32, four, *second(data, at))
                fence()

    return add_one


@kernel
def _store8(scratch, at, levels):
    for step in range(8):
        store_u8x32(scratch, at + 1024 * step, levels[step])


def block(code):
    where, first, second, levels = code.at, code.first, code.second, code.levels

    @kernel
    def decode_block(data, tile, block, blocks, chain, scratch):
        for panel in range(PANELS):
            at = where(data, tile, block, blocks, chain, panel)
            _store8(scratch, 64 * panel, levels(*first(data, at)))
            fence()
            _store8(scratch, 64 * panel + 32, levels(*second(data, at)))
            fence()

    return decode_block


@kernel
def _four_by_two(scratch, line, values, xs, sums, at):
    """Half of two steps of a decoded block for four tokens, whose x begin at bytes xs of values."""
    a, b, c, d = _load4(sums, at)
    e, f, g, h = _load4(sums, at + 64)
    for panel in range(PANELS):
        w, v = load_u8x32(scratch, line + 64 * panel), load_u8x32(scratch, line + 64 * panel + 1024)
        p, q = broadcast4_half(values, xs[0] + 4 * panel), broadcast4_half(values, xs[1] + 4 * panel)
        r, s = broadcast4_half(values, xs[2] + 4 * panel), broadcast4_half(values, xs[3] + 4 * panel)
        a, b, c, d = dot4_half(a, w, p), dot4_half(b, w, q), dot4_half(c, w, r), dot4_half(d, w, s)
        e, f, g, h = dot4_half(e, v, p), dot4_half(f, v, q), dot4_half(g, v, r), dot4_half(h, v, s)
    _store4(sums, at, a, b, c, d)
    _store4(sums, at + 64, e, f, g, h)


@kernel
def _load4(sums, at):
    a, b = load_i32x8(sums, at), load_i32x8(sums, at + ROW)
    return a, b, load_i32x8(sums, at + 2 * ROW), load_i32x8(sums, at + 3 * ROW)


@kernel
def _store4(sums, at, a, b, c, d):
    store_i32x8(sums, at, a)
    store_i32x8(sums, at + ROW, b)
    store_i32x8(sums, at + 2 * ROW, c)
    store_i32x8(sums, at + 3 * ROW, d)


@kernel
def _four_by_one(scratch, line, values, x, sums, at):
    """Half of four steps of a decoded block for one token."""
    a, b, c, d = load_i32x8(sums, at), load_i32x8(sums, at + 64), load_i32x8(sums, at + 128), load_i32x8(sums, at + 192)
    for panel in range(PANELS):
        w, four = line + 64 * panel, broadcast4_half(values, x + 4 * panel)
        a, b = dot4_half(a, load_u8x32(scratch, w), four), dot4_half(b, load_u8x32(scratch, w + 1024), four)
        c, d = dot4_half(c, load_u8x32(scratch, w + 2048), four), dot4_half(d, load_u8x32(scratch, w + 3072), four)
    store_i32x8(sums, at, a)
    store_i32x8(sums, at + 64, b)
    store_i32x8(sums, at + 128, c)
    store_i32x8(sums, at + 192, d)


def many(decode_block):
    @kernel
    def add_many(data, tile, blocks, chain, values, offsets, column, sums, scratch):
        quads = offsets.size // 4 * 4
        for block in range(blocks):
            decode_block(data, tile, block, blocks, chain, scratch)
            for i in range(0, quads, 4):
                a, b = column + offsets[i], column + offsets[i + 1]
                xs = a, b, column + offsets[i + 2], column + offsets[i + 3]
                for pair in range(8):
                    step, half = pair >> 1, 32 * (pair & 1)
                    at = ROW * i + 512 * block + 128 * step + half
                    _four_by_two(scratch, 2048 * step + half, values, xs, sums, at)
            for i in range(quads, offsets.size):
                for pair in range(4):
                    step, half = pair >> 1, 32 * (pair & 1)
                    at = ROW * i + 512 * block + 256 * step + half
                    _four_by_one(scratch, 4096 * step + half, values, column + offsets[i], sums, at)

    return add_many
