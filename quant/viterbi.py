"""The best bits for a sequence of numbers: tail-biting Viterbi search over a trellis code, in 16-bit integers.

A window of twelve bits is one of 4096 states; a step drops its oldest bits and takes in as many new ones (T20 two, T15
three and two numbers, T10 one). With the oldest bits on top of the state's number, the states that lead to the same
successors stand at equal distances, and a step is a few contiguous passes over 4096 metrics:

    best[mid]      = min over old of metric[old, mid]           and which `old`, kept as bits
    metric'[mid, new] = best[mid] + cost of the number at the window (mid, new)

Sequences are cyclic. A first short search across the junction, from anywhere to anywhere, fixes the window there; a
second one goes once around from that window to itself. All of it is integer arithmetic with ties to the lowest
state: the same bits on every machine.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit

from quant import aligned
from quant.codes import T10, T15, Code, levels
from quant.simd import kernel
from quant.viterbi_simd import STATES, step1, step2, step3

UNIT = 5200  # of a standard deviation, in the integers of a search
LIMIT = 3.5  # standard deviations to which numbers are clipped, so that differences fit 16 bits
JUNCTION = 40  # steps searched on either side of the junction
WORST = 60000  # metric of an impossible state


class Search(NamedTuple):
    """What the search knows of a code."""

    values: np.ndarray  # int16 [numbers per step, 4096]: (level - zero) * unit, in UNIT
    levels: np.ndarray  # int8 [numbers per step, 4096], less zero
    new: int  # bits per step


def new_bits(code: Code) -> int:
    return {4: 2, 3: 3, 2: 1}[code.halves]


@cache
def search_of(code: Code) -> Search:
    """Tables of the windows: see `split` for how a state spells its bits."""
    e, o = split(code, np.arange(STATES, dtype=np.uint16)[:, None])
    per_step = 2 if code is T15 else 1
    found = levels(code, e, o)[:, :per_step].T
    values = np.rint((found.astype(np.float64) - code.zero) * code.unit * UNIT).astype(np.int16)
    on_lines = aligned.empty((values.nbytes,)).view(np.int16).reshape(values.shape)
    on_lines[:] = values
    return Search(on_lines, (found.astype(np.int16) - code.zero).astype(np.int8), new_bits(code))


def split(code: Code, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The twelve bits of states uint16 [..., 1], oldest first, as streams e and o of one window."""
    bits = (states >> np.arange(11, -1, -1, dtype=np.uint16) & 1).astype(np.uint8)
    if code is T10:
        return bits, bits[..., :0]
    if code is T15:
        triples = bits.reshape(*bits.shape[:-1], 4, 3)
        return triples[..., :2].reshape(*bits.shape[:-1], 8), triples[..., 2]
    return bits[..., 0::2], bits[..., 1::2]


def streams(code: Code, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits uint8 of e and o from the windows uint16 [..., steps] of whole sequences: the oldest of each."""
    top = (states >> (12 - new_bits(code))).astype(np.uint8)
    if code is T10:
        return top, top[..., :0]
    if code is T15:
        return np.stack((top >> 2, top >> 1 & 1), axis=-1).reshape(*top.shape[:-1], -1), top & 1
    return top >> 1, top & 1


def search(code: Code, numbers: np.ndarray) -> np.ndarray:
    """Windows uint16 [sequences, steps] for fp32 [sequences, steps * numbers per step], of variance about one."""
    tables = search_of(code)
    clipped = np.rint(np.clip(numbers, -LIMIT, LIMIT) * np.float32(UNIT)).astype(np.int16)
    states = np.empty((len(numbers), numbers.shape[1] // len(tables.values)), np.uint16)
    metric = aligned.empty((4 * STATES,)).view(np.uint16).reshape(2, STATES)
    _search(clipped, tables.values.reshape(-1), len(tables.values), tables.new, metric, states)
    return states


def search_reference(code: Code, numbers: np.ndarray) -> np.ndarray:
    """The same windows, slowly: every state, every predecessor, one sequence at a time."""
    tables = search_of(code)
    clipped = np.rint(np.clip(numbers, -LIMIT, LIMIT) * np.float32(UNIT)).astype(np.int32)
    found = []
    for sequence in clipped:
        costs = _costs(sequence.reshape(-1, len(tables.values)), tables.values.astype(np.int64))
        steps = len(costs)
        near = [(steps - JUNCTION + i) % steps for i in range(2 * JUNCTION)]
        path = _path(costs[near], np.zeros(STATES, np.int64), tables.new, None)
        anchor = path[JUNCTION]
        start = np.full(STATES, WORST)
        start[anchor] = 0
        path = _path(np.roll(costs, -1, axis=0), start, tables.new, anchor)
        found.append(np.roll(path, 1))
    return np.array(found, np.uint16)


def _costs(numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """int64 [steps, 4096]"""
    return sum((np.square(numbers[:, i, None] - values[i]) >> 16) for i in range(len(values)))


def _path(costs: np.ndarray, metric: np.ndarray, new: int, last: int | None) -> list[int]:
    """The best state after each of the steps, from the metrics before them; ending in `last` or anywhere."""
    choices = []
    for step in costs:
        before = metric.reshape(1 << new, -1)  # [old, mid]
        choices.append(before.argmin(axis=0))
        metric = np.minimum(np.repeat(before.min(axis=0), 1 << new) + step, 65535)
    state = int(metric.argmin()) if last is None else last
    path = []
    for choice in reversed(choices):
        path.append(state)
        mid = state >> new
        state = int(choice[mid]) << (12 - new) | mid
    return path[::-1]


@njit(cache=True, nogil=True)
def _search(numbers, values, per_step, new, metric, states):
    steps = states.shape[1]
    choices = np.empty((max(steps, 2 * JUNCTION), (STATES >> new >> 5) * ((1 << new) - 1)), np.uint32)
    for sequence in range(states.shape[0]):
        x, out = numbers[sequence], states[sequence]
        metric[0, :] = 0
        now = _run(x, values, per_step, new, steps - JUNCTION, 2 * JUNCTION, metric, choices)
        state, low = 0, 65535
        for s in range(STATES):
            if metric[now, s] < low:
                state, low = s, metric[now, s]
        for step in range(2 * JUNCTION - 1, JUNCTION, -1):
            state = _before(choices[step], state, new)
        metric[0, :] = WORST
        metric[0, state] = 0
        _run(x, values, per_step, new, 1, steps, metric, choices)
        out[0] = state
        for step in range(steps - 1, 0, -1):
            state = _before(choices[step], state, new)
            out[step] = state


@kernel
def _run(x, values, per_step, new, first, count, metric, choices):
    """`count` steps from number `first` on, cyclic; returns which of the two metrics is the last."""
    now = 0
    steps = x.size // per_step
    at = first % steps
    for step in range(count):
        _step(x, at, values, new, metric[now], metric[1 - now], choices[step])
        now = 1 - now
        at += 1
        if at == steps:
            at = 0
    return now


@kernel
def _before(choices, state, new):
    """The state before `state`, from the bits that one step kept."""
    mid = state >> new
    duels = (1 << new) - 1
    word, bit = choices[(mid >> 5) * duels : (mid >> 5) * duels + duels], np.uint32(mid & 31)
    if new == 1:
        old = word[0] >> bit & 1
    elif new == 2:
        high = word[2] >> bit & 1
        old = 2 * high + (word[high] >> bit & 1)
    else:
        top = word[6] >> bit & 1
        high = word[4 + top] >> bit & 1
        old = 4 * top + 2 * high + (word[2 * top + high] >> bit & 1)
    return np.int64(old) << (12 - new) | mid


@kernel
def _step(x, at, values, new, metric, out, kept):
    for group in range((STATES >> new) // 32):
        if new == 1:
            step1(metric, x[at], x[at], values, out, kept, group)
        elif new == 2:
            step2(metric, x[at], x[at], values, out, kept, group)
        else:
            step3(metric, x[2 * at], x[2 * at + 1], values, out, kept, group)
