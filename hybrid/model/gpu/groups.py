"""A Triton kernel that multiplies int8_g32 and int4_g32 matrices as the CPU's kernels read them, 128 rows at a time.

Codes are small integers, exact in fp16; a group's 32 columns go through tensor cores and its sums get the scale of
their row, as in `quant.int4_g32.multiply_codes`. So weights are never rounded.
"""

import triton
import triton.language as tl

from hybrid.model.gpu.rows import claim
from quant import int4_g32, int8_g32

INT8 = tl.constexpr(8)
INT8_WORDS, INT4_WORDS = tl.constexpr(int8_g32.BLOCK // 4), tl.constexpr(int4_g32.HALF // 4)  # of a block, a half block


@triton.jit
def _int8_group(words, scales, tile, tiles, groups, group):
    """Codes fp16 [128, 32] and scales fp32 [128] of one group of columns of four tiles of 32 rows."""
    here = (tile.to(tl.int64) * groups + group) * INT8_WORDS
    inside = tile < tiles
    line, row, place = tl.arange(0, 8)[None, :, None], tl.arange(0, 32)[None, None, :], tl.arange(0, 4)
    found = tl.load(words + here[:, None, None] + 32 * line + row, mask=inside[:, None, None], other=0)
    codes = ((found[:, :, :, None] >> 8 * place[None, None, None, :]) & 255) - 128
    scale = tl.load(scales + 2 * here[:, None] + 512 + tl.arange(0, 32)[None, :], mask=inside[:, None], other=0.0)
    ordered = tl.reshape(tl.permute(codes, (0, 2, 1, 3)), (128, 32))
    return ordered.to(tl.float16), tl.reshape(scale.to(tl.float32), (128,))


@triton.jit
def _int4_group(words, scales, half, halves, wide, group):
    """The same from eight half tiles of 16 rows, whose blocks have two groups each."""
    here = ((half // 2).to(tl.int64) * wide + group // 2) * (2 * INT4_WORDS) + half % 2 * INT4_WORDS
    inside = half < halves
    line, row, place = tl.arange(0, 4)[None, :, None], tl.arange(0, 16)[None, None, :], tl.arange(0, 8)
    at = words + here[:, None, None] + 64 * (group % 2) + 16 * line + row
    found = tl.load(at, mask=inside[:, None, None], other=0)
    codes = ((found[:, :, :, None] >> (place % 4 * 8 + place // 4 * 4)[None, None, None, :]) & 15) - 8
    beside = 2 * here[:, None] + 256 + 16 * (group % 2) + tl.arange(0, 16)[None, :]
    scale = tl.load(scales + beside, mask=inside[:, None], other=0.0)
    ordered = tl.reshape(tl.permute(codes, (0, 2, 1, 3)), (128, 32))
    return ordered.to(tl.float16), tl.reshape(scale.to(tl.float32), (128,))


@triton.jit(do_not_specialize=["pairs"])
def multiply_groups(
    words, scales, starts, experts, first, rows, x, x_scales, out, pairs, columns, tiles, BITS: tl.constexpr,
    ROUTED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out fp32 [pairs, parts, rows padded to 128] = matrix times rows of x; programs (pair, 128 rows, part).

    words int32 and scales bf16 are two views of the same bytes. ROUTED: of matrix `experts[pair]`, which starts at byte
    starts[experts[pair]] (below 0: it gives zeros), times row rows[pair]; arguments as of `multiply_trellis`. Otherwise
    of the only matrix times every row, programs (GROUP rows of x, 128 rows, part).
    """
    part = tl.program_id(2)
    groups = columns // 32
    each = tl.cdiv(groups, tl.num_programs(2))
    begin, end = part * each, tl.minimum((part + 1) * each, groups)
    if ROUTED:
        position = tl.program_id(0)
        leads, expert, member = claim(experts, first, pairs, position, GROUP)
        if not leads:
            return
        pair = position + tl.arange(0, GROUP).to(tl.int64)
        row = tl.load(rows + pair, mask=member, other=0)
        start = tl.load(starts + expert)
        end = tl.where(start < 0, begin, end)
        words += start // 4
        scales += start // 2
    else:
        pair = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
        member = pair < pairs
        row = pair
    total = tl.zeros((128, GROUP), tl.float32)
    for group in range(begin, end):
        if BITS == INT8:
            tile = tl.program_id(1) * 4 + tl.arange(0, 4)
            codes, scale = _int8_group(words, scales, tile, tiles, groups, group)
        else:
            half = tl.program_id(1) * 8 + tl.arange(0, 8)
            codes, scale = _int4_group(words, scales, half, 2 * tiles, tl.cdiv(groups, 2), group)
        at = x + row[None, :] * columns + (32 * group + tl.arange(0, 32))[:, None]
        total += tl.dot(codes, tl.load(at, mask=member[None, :], other=0.0)) * scale[:, None]
    total *= tl.load(x_scales + row, mask=member, other=0.0)[None, :]
    at = tl.program_id(1) * 128 + tl.arange(0, 128)
    to = (pair * tl.num_programs(2) + part) * (tl.num_programs(1) * 128)
    tl.store(out + to[None, :] + at[:, None], total, mask=member[None, :])
