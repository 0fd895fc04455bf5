"""A Triton kernel that multiplies the trellis formats as packs hold them, a block of 128 rows by 64 columns at a time.

The bytes are those of `quant.trellis`. A level is the sum of two lookups, each by eight bits of the streams: where
`quant.codes` xors one nibble with a table of the other, the table here holds what comes of all 256 pairs. Levels are
small integers, exact in fp16, and go through tensor cores; row scales are applied to the sums.
"""

import numpy as np
import triton
import triton.language as tl

from hybrid.model.gpu.rows import claim
from quant.codes import T10, T15, T20, Code

HALVES_T20, HALVES_T15, HALVES_T10 = (tl.constexpr(code.halves) for code in (T20, T15, T10))
TABLE_T20, TABLE_T15, TABLE_T10 = tl.constexpr(0), tl.constexpr(512), tl.constexpr(1536)  # where each begins


def tables() -> np.ndarray:
    """int8 [2048]: of each code the first lookup less the code's zero, then the second.

    T15 has two of each, for even and for odd steps.
    """
    return np.concatenate([_tables(code) for code in (T20, T15, T10)])


def _tables(code: Code) -> np.ndarray:
    nibble, other = np.arange(256) & 15, np.arange(256) >> 4
    first = [np.array(a)[nibble ^ np.array(code.p)[other]] - code.zero for a in code.a]
    second = [np.array(b)[nibble ^ np.array(code.q)[other]] for b in code.b]
    return np.concatenate(first + second).astype(np.int8)


@triton.jit
def _place(panel, block, ahead, blocks, chain):
    """Block and panels of what follows `ahead` blocks later: past the last block, the next panel of a cyclic chain."""
    after = block + ahead
    return after % blocks, (panel & -chain) | ((panel + after // blocks) & (chain - 1))


@triton.jit
def _line(data, panel, block, ahead, blocks, chain, HALVES: tl.constexpr):
    """Eight bits of stream e of every lane, int32 [panels, 64]."""
    pitch: tl.constexpr = 128 if HALVES == HALVES_T20 else 64
    after, other = _place(panel, block, ahead, blocks, chain)
    return tl.load(data + after * (512 * HALVES) + pitch * other + tl.arange(0, 64)[None, :]).to(tl.int32)


@triton.jit
def _odd_line(data, panel, block, ahead, blocks, chain, HALVES: tl.constexpr):
    """The same of stream o: eight bits for T20, four for T15."""
    after, other = _place(panel, block, ahead, blocks, chain)
    lane = tl.arange(0, 64)[None, :]
    if HALVES == HALVES_T20:
        found = tl.load(data + after * 2048 + 128 * other + 64 + lane).to(tl.int32)
    else:
        both = tl.load(data + after * 1536 + 1024 + 32 * other + lane % 32).to(tl.int32)
        found = (both >> lane // 32 * 4) & 15
    return found


@triton.jit
def _windows(stream, step):
    """Four bits from each step on: int32 [panels, 64] -> [panels, 64, 8]."""
    return (stream[:, :, None] >> step) & 15


@triton.jit
def _levels(data, tables, block, blocks, chain, HALVES: tl.constexpr):
    """Levels less the code's zero, of a block of the tile at `data`: int8 [16 panels, 64 lanes, 8 steps]."""
    panel, step = tl.arange(0, 16)[:, None], tl.arange(0, 8)[None, None, :]
    e = _line(data, panel, block, 0, blocks, chain, HALVES) | _line(data, panel, block, 1, blocks, chain, HALVES) << 8
    if HALVES == HALVES_T10:
        e |= _line(data, panel, block, 2, blocks, chain, HALVES) << 16
        ahead = _windows(e, step + 8) << 4
        first = TABLE_T10 + (_windows(e, step) | ahead)
        second = TABLE_T10 + 256 + (_windows(e, step + 4) | ahead)
    else:
        o = _odd_line(data, panel, block, 0, blocks, chain, HALVES)
        next_o = _odd_line(data, panel, block, 1, blocks, chain, HALVES)
        if HALVES == HALVES_T20:
            o |= next_o << 8
            first = TABLE_T20 + (_windows(e, step) | _windows(o, step + 2) << 4)
            second = TABLE_T20 + 256 + (_windows(o, step) | _windows(e, step + 2) << 4)
        else:
            shared = _windows(o | next_o << 4, step // 2) << 4
            phase = TABLE_T15 + 256 * (step % 2)
            first = phase + (_windows(e, step) | shared)
            second = phase + 512 + (_windows(e, step + 3) | shared)
    return tl.load(tables + first) + tl.load(tables + second)


@triton.jit
def _plane(
    data, tables, x, rows, member, columns, begin, end, scales, block, blocks, chain, HALVES: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles begin..end of the slab at `data` times x, and times the row scales at `scales`: fp32 [128, GROUP]."""
    total = tl.zeros((128, GROUP), tl.float32)
    for tile in range(begin, end):
        levels = _levels(data + tile * blocks * (512 * HALVES), tables, block, blocks, chain, HALVES)
        lanes = tl.reshape(levels.to(tl.float16), (16, 16, 4, 8))  # panel, row of a step, column of a panel, step
        weights = tl.reshape(tl.permute(lanes, (3, 1, 0, 2)), (128, 64))
        column = 64 * tile + tl.arange(0, 64)
        inside = (column < columns)[:, None] & member[None, :]
        total = tl.dot(weights, tl.load(x + rows[None, :] * columns + column[:, None], mask=inside, other=0.0), total)
    return total * tl.load(scales + tl.arange(0, 128)).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["pairs"])
def multiply_trellis(
    data, row_scales, tables, planes, experts, first, rows, x, x_scales, out, pairs, columns, tiles, blocks, chain,
    GROUP: tl.constexpr,
):  # fmt: skip
    """out fp32 [pairs, parts, padded rows] = each pair's expert times its row of x; programs (pair, 128 rows, part).

    data uint8 and row_scales bf16 are two views of all experts' bytes; planes int64 [experts, 2, 3] as in
    `quant.trellis_moe.Matrices`, of which an expert without any gives zeros; experts and first as `claim` takes them;
    rows int64 [pairs]; x fp16 [.., columns] with x_scales from `encode_rows`.
    """
    position, part = tl.program_id(0), tl.program_id(2)
    leads, expert, member = claim(experts, first, pairs, position, GROUP)
    if not leads:
        return
    slab, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    pair = position + tl.arange(0, GROUP).to(tl.int64)
    row = tl.load(rows + pair, mask=member, other=0)
    each = tl.cdiv(tiles, tl.num_programs(2))
    begin, end = part * each, tl.minimum((part + 1) * each, tiles)
    total = tl.zeros((128, GROUP), tl.float32)
    for plane in range(2):
        entry = planes + (expert * 2 + plane) * 3
        halves, scales = tl.load(entry), row_scales + tl.load(entry + 1) // 2 + tl.program_id(1) * 128
        bits = data + tl.load(entry + 2) + slab.to(tl.int64) * tiles * blocks * 512 * halves
        if halves == HALVES_T20:
            total += _plane(
                bits, tables, x, row, member, columns, begin, end, scales, block, blocks, chain, HALVES_T20, GROUP
            )
        elif halves == HALVES_T15:
            total += _plane(
                bits, tables, x, row, member, columns, begin, end, scales, block, blocks, chain, HALVES_T15, GROUP
            )
        elif halves == HALVES_T10:
            total += _plane(
                bits, tables, x, row, member, columns, begin, end, scales, block, blocks, chain, HALVES_T10, GROUP
            )
    total *= tl.load(x_scales + row, mask=member, other=0.0)[None, :]
    at = tl.program_id(1) * 128 + tl.arange(0, 128)
    to = (pair * tl.num_programs(2) + part) * (tl.num_programs(1) * 128)
    tl.store(out + to[None, :] + at[:, None], total, mask=member[None, :])
