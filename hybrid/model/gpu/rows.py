"""Triton kernels over whole rows: what stands before, between and after the products.

Products multiply fp16, whose ten bits keep what a bf16 row says exactly and round a rotated one by 2^-11. A row is
first brought by a power of two to where fp16 is widest, so nothing overflows whatever the model computes; values that
are not numbers stay so.
"""

import triton
import triton.language as tl

COLUMNS = tl.constexpr(1024)  # of a program of `combine_rows`
LARGEST = tl.constexpr(14)  # the exponent a row's largest value gets


@triton.jit
def hadamard(x, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The rotation of `quant.rotation` but for its signs: fp32 [ROWS, BLOCK = 2^STAGES], along the last axis."""
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(x, (ROWS * BLOCK >> stage + 1, 2, 1 << stage))
        low, high = tl.split(tl.permute(pairs, (0, 2, 1)))
        x = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 2, 1)), (ROWS, BLOCK))
    return x * (1.0 / tl.sqrt(tl.full((1, 1), BLOCK, tl.float32)))


@triton.jit
def store_halves(y, values, scales, row, at, columns):
    """Write row `row` of values fp16 [rows, columns] and scales fp32 [rows]; their product is y, fp32, at `at`."""
    largest = tl.max(tl.max(tl.abs(y), axis=1), axis=0)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, LARGEST + 1) - LARGEST
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(values + row * columns + at, (y / scale).to(tl.float16), mask=at < columns)
    tl.store(scales + row, scale)


@triton.jit
def encode_rows(
    x, sign, values, scales, columns, ROTATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A row of x [rows, columns] as the products take it, rotated first if ROTATED; a program per row.

    A row is seen as [ROWS, BLOCK = 2^STAGES], its last rows filled up with zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    y = tl.load(x + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    if ROTATED:
        y = hadamard(y * tl.load(sign + at, mask=at < columns, other=0.0), ROWS, BLOCK, STAGES)
    store_halves(y, values, scales, row, at, columns)


@triton.jit
def join_rows(
    raw, sign, values, scales, parts, pitch, columns, ROTATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """SwiGLU between two products: raw fp32 [rows, parts, pitch] holds sixteen gates and their sixteen ups in turn."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    source = raw + row * parts * pitch + at // 16 * 32 + at % 16
    gate, up = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for part in range(parts):
        gate += tl.load(source + part * pitch, mask=at < columns, other=0.0)
        up += tl.load(source + part * pitch + 16, mask=at < columns, other=0.0)
    y = gate / (1.0 + tl.exp(-gate)) * up
    if ROTATED:
        y = hadamard(y * tl.load(sign + at, mask=at < columns, other=0.0), ROWS, BLOCK, STAGES)
    store_halves(y, values, scales, row, at, columns)


@triton.jit
def combine_rows(raw, places, weights, y, parts, pitch, columns, TERMS: tl.constexpr, WEIGHTED: tl.constexpr):
    """y [tokens, columns] = sum over a token's TERMS of weight * sum of parts; raw fp32 [terms, parts, pitch].

    places int64 and weights fp32 [tokens, TERMS] say which rows of raw; not WEIGHTED, a token has its own row and 1.
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for term in range(TERMS):
        place = tl.load(places + token * TERMS + term) if WEIGHTED else token
        product = tl.zeros((COLUMNS,), tl.float32)
        for part in range(parts):
            product += tl.load(raw + (place * parts + part) * pitch + at, mask=at < columns, other=0.0)
        total += product * (tl.load(weights + token * TERMS + term) if WEIGHTED else 1.0)
    tl.store(y + token * columns + at, total.to(y.dtype.element_ty), mask=at < columns)


@triton.jit
def claim(experts, first, pairs, position, GROUP: tl.constexpr):
    """Whether the pair at `position` leads GROUP pairs of one expert, that expert, and which of the GROUP are its own.

    experts int64 [pairs], ascending; first int64 [pairs], where each one's expert begins.
    """
    expert = tl.load(experts + position)
    leads = (position - tl.load(first + position)) % GROUP == 0
    pair = position + tl.arange(0, GROUP)
    return leads, expert, (pair < pairs) & (tl.load(experts + pair, mask=pair < pairs, other=-1) == expert)
