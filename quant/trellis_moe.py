"""All routed experts of a batch in one launch, for the trellis formats; each matrix in a format of its own.

The same computation as `quant.kernels`, with rotated activations. Work is cut along columns too: an item is one span of
one slab of one plane of one expert, some 500 KB of bits at 2 bits per weight. What spans add up to in fp32 is added in
their order, so that the result does not depend on the number of threads.

    encode   per token:          rotate, int8
    gate_up  per item:           raw[pair, part] = span product
    inner    per pair:           sum of parts, SwiGLU, rotate, int8
    down     per item:           raw[pair, part] = span product
    combine  per token and rows: y = sum over the token's experts of weight * (sum of parts)
"""

from typing import NamedTuple

import numpy as np
from numba import get_num_threads, njit, prange

from quant import aligned
from quant.activations import SPAN, empty_spans, encode_span, encode_spans
from quant.kernels import DONE, NEXT, group_by_expert, wait
from quant.rotation import rotate, rotate_row
from quant.simd import add_f32, atomic_add, kernel, load_f32x16, mul_f32, splat_f32, store_f32x16
from quant.swiglu import swiglu, swiglu_lanes
from quant.trellis import TRELLIS, layout, matrix_bytes, multiply
from quant.trellis_product import ROWS, SCRATCH, TOKENS, add_span, deliver, zero_of

SEPARATE = 64 << 20  # bytes of products above which the parts of a sum are added where they arise
CHUNK = 1024  # output rows of a combining task


class Matrices(NamedTuple):
    """The same matrix of every expert of a layer: one shape, a format each."""

    planes: np.ndarray  # int64 [experts, 2, 3]: half bits per weight (0: no such plane), byte of scales, byte of bits
    rows: int
    columns: int
    slabs: int
    steps: int
    chain: int
    tiles: int
    sign: np.ndarray  # fp32 [columns], the signs of the rotation


class TrellisExperts(NamedTuple):
    """The routed experts of one layer; gate_up as in `quant.kernels.Experts`."""

    data: np.ndarray  # uint8, one layer's blobs
    gate_up: Matrices
    down: Matrices


def matrices(names: list[str], offsets: np.ndarray, rows: int, columns: int, sign: np.ndarray) -> Matrices:
    """names[e] is the format of expert e, whose bytes start at offsets[e]; sign int8 [columns]."""
    shape = layout(rows, columns)
    planes = np.zeros((len(names), 2, 3), np.int64)
    for expert, name in enumerate(names):
        start = int(offsets[expert])
        for index, code in enumerate(TRELLIS[name]):
            planes[expert, index] = code.halves, start, start + shape.scale_bytes
            start += shape.plane_bytes(code)
    _, _, slabs, steps, chain, tiles = shape
    return Matrices(planes, rows, columns, slabs, steps, chain, tiles, sign.astype(np.float32))


def experts(
    data: np.ndarray, offsets: np.ndarray, formats: list[tuple[str, str]], signs: tuple[np.ndarray, np.ndarray]
) -> TrellisExperts:
    """A layer from its blobs: expert e is gate_up, then down, from byte offsets[e] of data.

    formats[e] names the two; signs are those of their rotations, int8 [hidden] and [intermediate].
    """
    hidden, intermediate = (len(sign) for sign in signs)
    names = [list(each) for each in zip(*formats, strict=True)]
    after = [matrix_bytes(name, 2 * intermediate, hidden) for name in names[0]]
    return TrellisExperts(
        data,
        matrices(names[0], offsets, 2 * intermediate, hidden, signs[0]),
        matrices(names[1], np.asarray(offsets) + after, hidden, intermediate, signs[1]),
    )


class Buffers(NamedTuple):
    """What a launch writes besides y."""

    raw: np.ndarray  # fp32 [pairs, parts, rows]
    out: np.ndarray  # fp32 [pairs, parts, rows]
    row: np.ndarray  # fp32 [threads, 2, longest row]
    sums: np.ndarray  # int32 [threads, tokens * ROWS], for at most TOKENS of them
    offsets: np.ndarray  # int64 [threads, TOKENS]
    scratch: np.ndarray  # uint8 [threads, SCRATCH]
    counters: np.ndarray  # int64 [16]


def _parts(matrix: Matrices, pairs: int) -> int:
    """Planes times spans, or 1 where their products would take too much memory apart."""
    planes = 2 if matrix.planes[:, 1, 0].any() else 1
    parts = planes * -(-matrix.columns // SPAN)
    padded = matrix.slabs * matrix.steps * 16
    return parts if 4 * pairs * parts * padded <= SEPARATE else 1


def _buffers(experts: TrellisExperts, tokens: int, pairs: int, threads: int) -> Buffers:
    gate_up, down = experts.gate_up, experts.down
    raw, out = (
        np.empty((pairs, _parts(matrix, pairs), matrix.slabs * matrix.steps * 16), np.float32)
        for matrix in (gate_up, down)
    )
    return Buffers(
        raw,
        out,
        np.empty((threads, 2, max(gate_up.columns, down.columns)), np.float32),
        aligned.empty((threads, min(TOKENS, tokens) * 4 * ROWS)).view(np.int32),
        np.empty((threads, TOKENS), np.int64),
        aligned.empty((threads, SCRATCH)),
        np.zeros(16, np.int64),
    )


def moe(experts: TrellisExperts, x: np.ndarray, topk_ids: np.ndarray, topk_weights: np.ndarray) -> np.ndarray:
    """Routed experts of one layer: x fp32 [tokens, hidden] -> fp32 [tokens, hidden]. Call from one thread at a time.

    topk_ids int64 and topk_weights fp32, both [tokens, k], C-contiguous like x. An id of -1 adds nothing.
    """
    count = len(experts.gate_up.planes)
    assert topk_ids.size == 0 or -1 <= topk_ids.min() <= topk_ids.max() < count, "no such expert"
    y = np.empty(x.shape, np.float32)
    threads = get_num_threads()
    buffers = _buffers(experts, len(x), topk_ids.size, threads)
    inputs, inner = empty_spans(*x.shape), empty_spans(topk_ids.size, experts.down.columns)
    _launch(*experts, topk_ids, topk_weights, x, inputs, inner, buffers, y, threads)
    return y


def moe_reference(experts: TrellisExperts, blobs, formats, x, topk_ids, topk_weights) -> np.ndarray:
    """What `moe` computes, bit for bit, in NumPy; blobs[e] are expert e's bytes, gate_up then down."""
    pairs = group_by_expert(topk_ids, topk_weights, len(blobs))
    rows, hidden = experts.gate_up.rows, experts.gate_up.columns
    y = np.zeros_like(x)
    for a, expert in enumerate(pairs.experts):
        of_expert = slice(pairs.starts[a], pairs.starts[a + 1])
        tokens, (first, second) = pairs.tokens[of_expert], formats[expert]
        split = matrix_bytes(first, rows, hidden)
        products = multiply(first, blobs[expert][:split], rows, encode_spans(rotate(x[tokens], experts.gate_up.sign)))
        gate, up = (products.reshape(len(tokens), -1, 2, 16)[:, :, part].reshape(len(tokens), -1) for part in (0, 1))
        inner = encode_spans(rotate(swiglu(gate, up), experts.down.sign))
        y[tokens] += pairs.weights[of_expert, None] * multiply(second, blobs[expert][split:], hidden, inner)
    return y


# --- the launch ------------------------------------------------------------------------------------------------------


@njit(cache=True)
def _by_token(pairs, tokens, k):
    """int64 [tokens, k]: each token's pairs, in ascending order of their experts, then -1 where it has fewer."""
    found, filled = np.full((tokens, k), -1, np.int64), np.zeros(tokens, np.int64)
    for pair in range(pairs.tokens.size):
        token = pairs.tokens[pair]
        found[token, filled[token]] = pair
        filled[token] += 1
    return found


@njit(cache=True, nogil=True)  # so that other threads can have a drive read meanwhile
def _launch(data, gate_up, down, topk_ids, topk_weights, x, inputs, inner, buffers, y, threads):
    pairs = group_by_expert(topk_ids, topk_weights, gate_up.planes.shape[0])
    by_token = _by_token(pairs, x.shape[0], topk_ids.shape[1])
    order = np.arange(pairs.tokens.size)
    _spread(data, gate_up, down, pairs, by_token, order, x, inputs, inner, buffers, y, threads)


@njit(parallel=True, cache=True)
def _spread(data, gate_up, down, pairs, by_token, order, x, inputs, inner, buffers, y, threads):
    # Numba takes no tuple of tuples into a parallel loop, hence the many arguments.
    for thread in prange(threads):
        _work(data, gate_up, down, pairs, by_token, order, x, inputs, inner, buffers, y, thread)


@kernel
def _items(matrix, pairs, parts):
    """Tasks of one product: experts in use times slabs times parts."""
    return pairs.experts.size * matrix.slabs * parts


@kernel
def _work(data, gate_up, down, pairs, by_token, order, x, inputs, inner, buffers, y, thread):
    """One thread: take tasks in order until none is left; see the list at the top."""
    counters = buffers.counters
    tokens, chunks = x.shape[0], -(-x.shape[1] // CHUNK)
    encoded = tokens
    multiplied = encoded + _items(gate_up, pairs, buffers.raw.shape[1])
    joined = multiplied + pairs.tokens.size
    projected = joined + _items(down, pairs, buffers.out.shape[1])
    last = projected + tokens * chunks
    while True:
        task = atomic_add(counters, NEXT, 1)
        if task >= last:
            break
        if task < encoded:
            _encode(x[task], buffers.row[thread, 0], gate_up, inputs, task)
        elif task < multiplied:
            wait(counters, encoded)
            _multiply(data, gate_up, pairs, task - encoded, inputs, pairs.tokens, buffers.raw, buffers, thread)
        elif task < joined:
            wait(counters, multiplied)
            _inner(gate_up, down, pairs, task - multiplied, inner, buffers, thread)
        elif task < projected:
            wait(counters, joined)
            _multiply(data, down, pairs, task - joined, inner, order, buffers.out, buffers, thread)
        else:
            wait(counters, projected)
            item = task - projected
            _combine(down, pairs, by_token[item // chunks], buffers.out, y[item // chunks], item % chunks)
        atomic_add(counters, DONE, 1)


@kernel
def _encode(x, room, matrix, out, index):
    """Rotate x fp32 [columns] as `matrix` wants it and store it as int8 in row `index` of `out`."""
    rotated = room[: x.size]
    rotate_row(x, matrix.sign, rotated, x.size & -x.size)
    for span in range(out.scales.shape[1]):
        encode_span(rotated, out, index, span)


@kernel
def _multiply(data, matrix, pairs, item, x, places, out, buffers, thread):
    """One task: expert, slab and part `item`, or all parts one after another where they are not kept apart."""
    kept = out.shape[1]
    active, slab, part = item // (matrix.slabs * kept), item // kept % matrix.slabs, item % kept
    spans = x.scales.shape[1]
    first, stop = (part, part + 1) if kept > 1 else (0, 2 * spans)
    for index in range(first, stop):
        _part(data, matrix, pairs, active, slab, index // spans, index % spans, x, places, out, buffers, thread)


@kernel
def _part(data, matrix, pairs, active, slab, plane, span, x, places, out, buffers, thread):
    """One plane and span of one slab for every token of one expert."""
    expert = pairs.experts[active]
    halves = matrix.planes[expert, plane, 0]
    if halves == 0:
        return
    rows, kept = 16 * matrix.steps, out.shape[1]
    index = plane * x.scales.shape[1] + span if kept > 1 else 0
    more = kept == 1 and plane + span > 0
    scales = matrix.planes[expert, plane, 1] + 2 * slab * rows
    bits = matrix.planes[expert, plane, 2] + slab * matrix.tiles * rows * halves * 4
    sums, scratch, values = buffers.sums[thread], buffers.scratch[thread], x.values.reshape(-1)
    for first in range(pairs.starts[active], pairs.starts[active + 1], TOKENS):
        count = min(TOKENS, pairs.starts[active + 1] - first)
        offsets = buffers.offsets[thread, :count]
        for token in range(count):
            offsets[token] = places[first + token] * x.values.shape[1]
        add_span(halves, data, bits, matrix.steps, matrix.chain, matrix.tiles, span, values, offsets, sums, scratch)
        for token in range(count):
            place = places[first + token]
            less, factor = zero_of(halves) * x.sums[place, span], x.scales[place, span]
            out_row = out[first + token, index]
            deliver(sums, token, matrix.steps, data, scales, less, factor, out_row, slab * rows, more)


@kernel
def _expert_of(pairs, pair):
    """The expert of a pair, found by halving."""
    low, high = 0, pairs.experts.size - 1
    while low < high:
        middle = (low + high + 1) // 2
        if pairs.starts[middle] <= pair:
            low = middle
        else:
            high = middle - 1
    return pairs.experts[low]


@kernel
def _parts_of(matrix, expert, out):
    """Parts of a product that were written for an expert."""
    if out.shape[1] == 1:
        return 1
    spans = -(-matrix.columns // SPAN)
    return 2 * spans if matrix.planes[expert, 1, 0] else spans


@kernel
def _total(products, parts, at):
    """Sum of the parts of sixteen products at byte `at`, in order."""
    total = splat_f32(np.float32(0))
    for part in range(parts):
        total = add_f32(total, load_f32x16(products[part], at))
    return total


@kernel
def _inner(gate_up, down, pairs, pair, inner, buffers, thread):
    """SwiGLU of one pair's products, rotated and encoded for down."""
    products, h = buffers.raw[pair], buffers.row[thread, 1][: down.columns]
    parts = _parts_of(gate_up, _expert_of(pairs, pair), buffers.raw)
    for at in range(0, 4 * h.size, 64):
        gate, up = _total(products, parts, 2 * at), _total(products, parts, 2 * at + 64)
        store_f32x16(h, at, swiglu_lanes(gate, up))
    _encode(h, buffers.row[thread, 0], down, inner, pair)


@kernel
def _combine(down, pairs, of_token, out, y, chunk):
    """CHUNK output rows of one token: its experts' outputs, weighted, in ascending order of the experts."""
    start, stop = 4 * CHUNK * chunk, 4 * min(CHUNK * (chunk + 1), y.size)
    y[start // 4 : stop // 4] = np.float32(0)
    for pair in of_token:
        if pair < 0:
            break
        parts, weight = _parts_of(down, _expert_of(pairs, pair), out), splat_f32(pairs.weights[pair])
        for at in range(start, stop, 64):
            product = mul_f32(weight, _total(out[pair], parts, at))
            store_f32x16(y, at, add_f32(load_f32x16(y, at), product))
