"""The loops every format shares: one launch computes all routed experts of a batch, gate to down.

    h[p] = swiglu(gate_e x_t, up_e x_t)      for every pair p = (token t, expert e) the router chose
    y[t] = sum over t's experts of weight_p * (down_e h[p])

Work is cut into some two dozen tasks per thread, taken in order from one shared counter: a core that is slow or busy
elsewhere simply takes fewer. Larger tasks waste less (2 MB instead of 0.5: +6 %), smaller ones share better. Down tasks
start when the last gate/up task is finished. Each output row belongs to one task and adds its experts in ascending
order, so the result does not depend on the number of threads.
"""

from typing import NamedTuple

import numpy as np
from numba import get_num_threads, njit, prange, types

from quant import activations, aligned, int8_g32
from quant.activations import encode_group, encode_token, row
from quant.int4_g32 import BLOCK, ROWS, Int4G32, dot_tile, dot_tile2, multiply
from quant.simd import add_f32, atomic_add, kernel, load_f32x16, mul_f32, splat_f32, store_f32x16, store_tile
from quant.swiglu import swiglu, swiglu_lanes

SMALLEST_TASK, LARGEST_TASK = 64 * 1024, 2 * 1024 * 1024  # bytes of weights
TASKS_PER_THREAD = 24
yield_processor = types.ExternalFunction("sched_yield", types.int32())  # libc: lets a preempted peer finish its task


class Experts(NamedTuple):
    """The routed experts of one layer, stacked.

    gate_up holds 2 * intermediate rows of `hidden` columns, sixteen rows of gate and the same sixteen of up in turn
    (`interleave`): one tile of 32 rows is sixteen whole SwiGLU inputs. down is [hidden, intermediate].
    """

    gate_up: Int4G32
    down: Int4G32


def interleave(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Two arrays [rows, anything] as one [2 * rows, anything], sixteen rows of each in turn."""
    parts = [matrix.reshape(-1, 16, matrix.shape[1]) for matrix in (gate, up)]
    return np.stack(parts, axis=1).reshape(-1, gate.shape[1])


class Pairs(NamedTuple):
    """The router's choices regrouped by expert, so that each expert's weights are read once for all its tokens."""

    experts: np.ndarray  # int64 [active]      ascending ids of the experts in use
    starts: np.ndarray  # int64 [active + 1]  pairs of experts[a] are starts[a]..starts[a+1]
    tokens: np.ndarray  # int64 [pairs]       ascending within an expert
    weights: np.ndarray  # fp32  [pairs]


@njit(cache=True)
def group_by_expert(topk_ids, topk_weights, experts):
    """topk_ids int64 [tokens, k] or -1 for nobody, topk_weights fp32 [tokens, k], number of experts -> Pairs."""
    tokens, k = topk_ids.shape
    counts = np.zeros(experts, np.int64)
    for t in range(tokens):
        for j in range(k):
            if topk_ids[t, j] >= 0:
                counts[topk_ids[t, j]] += 1
    active = np.flatnonzero(counts)
    starts = np.zeros(active.size + 1, np.int64)
    place = np.empty(experts, np.int64)
    for a in range(active.size):
        place[active[a]] = starts[a]
        starts[a + 1] = starts[a] + counts[active[a]]
    pairs = Pairs(active, starts, np.empty(starts[-1], np.int64), np.empty(starts[-1], np.float32))
    for t in range(tokens):
        for j in range(k):
            if topk_ids[t, j] < 0:
                continue
            at = place[topk_ids[t, j]]
            place[topk_ids[t, j]] += 1
            pairs.tokens[at] = t
            pairs.weights[at] = topk_weights[t, j]
    return pairs


def moe(experts: Experts, x: np.ndarray, topk_ids: np.ndarray, topk_weights: np.ndarray) -> np.ndarray:
    """Routed experts of one layer: x fp32 [tokens, hidden] -> fp32 [tokens, hidden]. Call from one thread at a time.

    topk_ids int64 and topk_weights fp32, both [tokens, k], C-contiguous like x. An id of -1 adds nothing.
    """
    tokens, hidden = x.shape
    stack = experts.gate_up.blocks
    assert topk_ids.size == 0 or -1 <= topk_ids.min() <= topk_ids.max() < stack.shape[0], "no such expert"
    inputs = activations.zeros(tokens, hidden)
    inner = activations.zeros(topk_ids.size, stack.shape[1] * 16)
    raw = np.empty((topk_ids.size, stack.shape[1] * 32), np.float32)
    y = np.empty((tokens, hidden), np.float32)
    counters = np.zeros(16, np.int64)
    threads = get_num_threads()
    wide = max(matrix.blocks.shape[2] for matrix in experts) if tokens >= int8_g32.WIDEN else 0
    widened = aligned.empty((threads, int8_g32.widened_bytes(wide)))
    _moe(*experts, topk_ids, topk_weights, x, inputs, inner, raw, y, widened, counters)
    return y


def moe_reference(experts: Experts, x: np.ndarray, topk_ids: np.ndarray, topk_weights: np.ndarray) -> np.ndarray:
    """What `moe` computes, bit for bit, in NumPy."""
    pairs = group_by_expert(topk_ids, topk_weights, len(experts.down.blocks))
    y = np.zeros_like(x)
    for a, expert in enumerate(pairs.experts):
        of_expert = slice(pairs.starts[a], pairs.starts[a + 1])
        tokens = pairs.tokens[of_expert]
        inputs = activations.encode(x[tokens])
        gate_up = multiply(experts.gate_up.blocks[expert], inputs).reshape(len(tokens), -1, 2, 16)
        gate, up = (gate_up[:, :, part].reshape(len(tokens), -1) for part in (0, 1))
        down = multiply(experts.down.blocks[expert], activations.encode(swiglu(gate, up)))
        y[tokens] += pairs.weights[of_expert, None] * down
    return y


@njit(cache=True, nogil=True)  # so that other threads can have a drive read meanwhile
def _moe(gate_up, down, topk_ids, topk_weights, x, inputs, inner, raw, y, widened, counters):
    pairs = group_by_expert(topk_ids, topk_weights, gate_up.blocks.shape[0])
    size = pairs.experts.size * (gate_up.blocks[0].size + down.blocks[0].size)
    task = min(max(size // (TASKS_PER_THREAD * len(widened)), SMALLEST_TASK), LARGEST_TASK)
    _launch(gate_up, down, pairs, x, inputs, inner, raw, y, widened, counters, task)


@njit(parallel=True, cache=True)
def _launch(gate_up, down, pairs, x, inputs, inner, raw, y, widened, counters, task):
    for thread in prange(len(widened)):
        _work(gate_up, down, pairs, x, inputs, inner, raw, y, widened[thread], counters, task)


NEXT, DONE = 0, 8  # counters on cache lines of their own


@kernel
def _work(gate_up, down, pairs, x, inputs, inner, raw, y, widened, counters, task_bytes):
    """One thread: take tasks, of `task_bytes` of weights, until none is left.

    First come tokens to encode, then gate and up, then down.
    """
    tokens = x.shape[0]
    groups = gate_up.blocks.shape[1] // 2  # of 32 inner values
    tiles = down.blocks.shape[1]
    group_step = max(1, task_bytes // (2 * gate_up.blocks.shape[2] * BLOCK))
    tile_step = max(1, task_bytes // (down.blocks.shape[2] * BLOCK))
    per_expert = -(-groups // group_step)
    inner_done = tokens + pairs.experts.size * per_expert
    last = inner_done + -(-tiles // tile_step)
    while True:
        task = atomic_add(counters, NEXT, 1)
        if task >= last:
            break
        if task < tokens:
            encode_token(x, inputs, task)
        elif task < inner_done:
            wait(counters, tokens)
            start = (task - tokens) % per_expert * group_step
            active = (task - tokens) // per_expert
            _gate_up(gate_up, pairs, active, start, min(start + group_step, groups), inputs, inner, raw, widened)
        else:
            wait(counters, inner_done)
            start = (task - inner_done) * tile_step
            _down(down, pairs, start, min(start + tile_step, tiles), inner, y, widened)
        atomic_add(counters, DONE, 1)


@kernel
def wait(counters, tasks):
    """Until `tasks` tasks are done: they were all taken before the caller's, so somebody is at work on them."""
    while atomic_add(counters, DONE, 0) < tasks:
        yield_processor()


@kernel
def _gate_up(gate_up, pairs, active, start, stop, inputs, inner, raw, widened):
    """Groups start..stop of 32 inner values for every token of one expert: gate, up, then SwiGLU and int8.

    The products go through memory so that the stream of weights never waits for the arithmetic on their sums.
    """
    wide = gate_up.blocks.shape[2]
    flat = gate_up.blocks[pairs.experts[active]].reshape(-1)
    first, last = pairs.starts[active], pairs.starts[active + 1]
    for tile in range(2 * start, 2 * stop):
        at, fours = tile * wide * BLOCK, _fours(first, last)
        if fours > first:
            int8_g32.widen(flat, at, wide, widened)
        for pair in range(first, fours, 4):
            _gate_up_four(widened, wide, inputs, pairs.tokens[pair : pair + 4], raw[pair : pair + 4], 128 * tile)
        twos = _twos(fours, last)
        for pair in range(fours, twos, 2):
            first_row, second_row = row(inputs, pairs.tokens[pair]), row(inputs, pairs.tokens[pair + 1])
            gate, up, gate2, up2 = dot_tile2(flat, at, wide, first_row, second_row)
            store_tile(raw[pair], 128 * tile, gate, up)
            store_tile(raw[pair + 1], 128 * tile, gate2, up2)
        for pair in range(twos, last):
            gate, up = dot_tile(flat, at, wide, row(inputs, pairs.tokens[pair]))
            store_tile(raw[pair], 128 * tile, gate, up)
    for pair in range(first, last):
        products, out = raw[pair], row(inner, pair)
        for group in range(start, stop):
            encode_group(_swiglu_at(products, 256 * group), _swiglu_at(products, 256 * group + 128), out, group)


@kernel
def _fours(first, last):
    """Where pairs first..last that are taken by fours end; the rest is taken by twos."""
    return first + (last - first) // 4 * 4 if last - first >= int8_g32.WIDEN else first


@kernel
def _twos(first, last):
    return first + (last - first) // 2 * 2


@kernel
def _gate_up_four(widened, wide, inputs, tokens, raw, at):
    rows = row(inputs, tokens[0]), row(inputs, tokens[1]), row(inputs, tokens[2]), row(inputs, tokens[3])
    gate, up = int8_g32.dot_tile4(widened, 0, 2 * wide, rows)
    store_tile(raw[0], at, gate[0], up[0])
    store_tile(raw[1], at, gate[1], up[1])
    store_tile(raw[2], at, gate[2], up[2])
    store_tile(raw[3], at, gate[3], up[3])


@kernel
def _swiglu_at(products, offset):
    return swiglu_lanes(load_f32x16(products, offset), load_f32x16(products, offset + 64))


@kernel
def _down(down, pairs, start, stop, inner, y, widened):
    """Output rows 32 * start to 32 * stop of every token, all experts."""
    wide = down.blocks.shape[2]
    y[:, ROWS * start : ROWS * stop] = np.float32(0)
    for active in range(pairs.experts.size):
        flat = down.blocks[pairs.experts[active]].reshape(-1)
        first, last = pairs.starts[active], pairs.starts[active + 1]
        for tile in range(start, stop):
            at, fours = tile * wide * BLOCK, _fours(first, last)
            if fours > first:
                int8_g32.widen(flat, at, wide, widened)
            for pair in range(first, fours, 4):
                _down_four(widened, wide, inner, pairs, pair, y, 128 * tile)
            twos = _twos(fours, last)
            for pair in range(fours, twos, 2):
                low, high, low2, high2 = dot_tile2(flat, at, wide, row(inner, pair), row(inner, pair + 1))
                _add_weighted(y, pairs, pair, 128 * tile, low, high)
                _add_weighted(y, pairs, pair + 1, 128 * tile, low2, high2)
            for pair in range(twos, last):
                low, high = dot_tile(flat, at, wide, row(inner, pair))
                _add_weighted(y, pairs, pair, 128 * tile, low, high)


@kernel
def _down_four(widened, wide, inner, pairs, pair, y, at):
    rows = row(inner, pair), row(inner, pair + 1), row(inner, pair + 2), row(inner, pair + 3)
    low, high = int8_g32.dot_tile4(widened, 0, 2 * wide, rows)
    _add_weighted(y, pairs, pair, at, low[0], high[0])
    _add_weighted(y, pairs, pair + 1, at, low[1], high[1])
    _add_weighted(y, pairs, pair + 2, at, low[2], high[2])
    _add_weighted(y, pairs, pair + 3, at, low[3], high[3])


@kernel
def _add_weighted(y, pairs, pair, at, low, high):
    out, weight = y[pairs.tokens[pair]], splat_f32(pairs.weights[pair])
    store_f32x16(out, at, add_f32(load_f32x16(out, at), mul_f32(weight, low)))
    store_f32x16(out, at + 64, add_f32(load_f32x16(out, at + 64), mul_f32(weight, high)))
