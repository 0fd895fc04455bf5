"""Triton kernels of absorbed attention for decode steps: every head of a token over the latent rows in its pages.

The rows a token sees are cut into parts, so that a single token fills a card; a part leaves its own mean and the
logarithm of its weight, which `merge_parts` puts together. Scores, softmax and sums are fp32.
"""

import triton
import triton.language as tl

from hybrid.memory.kv_format import PAGE_SIZE

PAGE = tl.constexpr(PAGE_SIZE)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _product(a, b, WIDE: tl.constexpr):
    """a times b in fp32; WIDE for the interpreter, which multiplies no bf16."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def _from_codes(codes, scales, DTYPE: tl.constexpr, KIND: tl.constexpr):
    """Values [rows, rank] of codes uint8 [rows, rank] with scales fp32 [rows, tiles], as `kv_codec` defines them."""
    if KIND == "fp8":  # as fp16 with another bias, so that cards without fp8 read it too
        bits = codes.to(tl.uint16)
        units = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        units = codes.to(tl.int8, bitcast=True).to(tl.float32)
    rows: tl.constexpr = codes.shape[0]
    tiles: tl.constexpr = scales.shape[1]
    values = units.reshape(rows, tiles, codes.shape[1] // tiles) * scales[:, :, None]
    return values.reshape(rows, codes.shape[1]).to(DTYPE)


@triton.jit
def attend_pages(
    queries, latents, scales, rotated, tables, sequences, lengths, sums, weights, scale, heads, table_pitch,
    HEADS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, KIND: tl.constexpr,
    TILES: tl.constexpr, ROW_BYTES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """sums fp32 [tokens, heads, parts, RANK] and weights fp32 [tokens, heads, parts]; programs (token, HEADS, part).

    queries [tokens, heads, RANK + ROPE]; of one layer's rows, each of ROW_BYTES, latents [slots, RANK], that is values
    or, where KIND is fp8 or int8, codes with scales [slots, TILES], and rotated [slots, ROPE]; tables int32 [sequences,
    table_pitch] of pages; sequences and lengths int32 [tokens]: whose pages, and how many of their rows the token sees.
    """
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    c, pe = tl.arange(0, RANK), tl.arange(0, ROPE)
    latent_pitch: tl.constexpr = ROW_BYTES * 8 // latents.dtype.element_ty.primitive_bitwidth
    rotated_pitch: tl.constexpr = ROW_BYTES * 8 // rotated.dtype.element_ty.primitive_bitwidth
    from_head = queries + (token * heads + head)[:, None] * (RANK + ROPE)
    query = tl.load(from_head + c[None, :], mask=(head < heads)[:, None], other=0.0)
    query_pe = tl.load(from_head + RANK + pe[None, :], mask=(head < heads)[:, None], other=0.0)
    table = tables + tl.load(sequences + token).to(tl.int64) * table_pitch
    length = tl.load(lengths + token)
    each = tl.cdiv(tl.cdiv(length, ROWS), tl.num_programs(2)) * ROWS
    largest = tl.full((HEADS,), float("-inf"), tl.float32)
    weight = tl.zeros((HEADS,), tl.float32)
    total = tl.zeros((HEADS, RANK), tl.float32)
    for start in range(part * each, tl.minimum((part + 1) * each, length), ROWS):
        place = start + tl.arange(0, ROWS)
        slot = tl.load(table + start // PAGE).to(tl.int64) * PAGE + place % PAGE
        seen = place < length
        key = tl.load(latents + slot[:, None] * latent_pitch + c[None, :], mask=seen[:, None], other=0)
        if KIND == "fp8" or KIND == "int8":
            tile = slot[:, None] * (ROW_BYTES // 4) + tl.arange(0, TILES)[None, :]
            key = _from_codes(key, tl.load(scales + tile, mask=seen[:, None], other=0.0), query.dtype, KIND)
        key_pe = tl.load(rotated + slot[:, None] * rotated_pitch + pe[None, :], mask=seen[:, None], other=0.0)
        key_pe = key_pe.to(query.dtype)
        scores = _product(query, tl.trans(key), WIDE) + _product(query_pe, tl.trans(key_pe), WIDE)
        scores = tl.where(seen[None, :], scores * (scale * LOG2_E), float("-inf"))
        above = tl.maximum(largest, tl.max(scores, axis=1))
        shrink, shares = tl.exp2(largest - above), tl.exp2(scores - above[:, None])
        weight = weight * shrink + tl.sum(shares, axis=1)
        total = total * shrink[:, None] + _product(shares.to(key.dtype), key, WIDE)
        largest = above
    to = (token * heads + head) * tl.num_programs(2) + part
    total /= tl.maximum(weight, 1.0)[:, None]  # what the largest score adds alone is 1
    tl.store(sums + to[:, None] * RANK + c[None, :], total, mask=(head < heads)[:, None])
    tl.store(weights + to, largest + tl.log2(tl.maximum(weight, 1.0)), mask=head < heads)


@triton.jit
def merge_parts(sums, weights, context, heads, PARTS: tl.constexpr, RANK: tl.constexpr):
    """context [tokens, heads, RANK]: what the parts of a token and head make together; programs (token, head)."""
    row = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    c = tl.arange(0, RANK)
    largest = tl.max(tl.load(weights + row * PARTS + tl.arange(0, PARTS)), axis=0)
    total, whole = tl.zeros((RANK,), tl.float32), 0.0
    for part in range(PARTS):
        share = tl.exp2(tl.load(weights + row * PARTS + part) - largest)
        total += share * tl.load(sums + (row * PARTS + part) * RANK + c)
        whole += share
    tl.store(context + row * RANK + c, (total / whole).to(context.dtype.element_ty))
