"""Eight steps of one panel, block `block` of the tile at byte `tile` of `data`: where they begin, and their lines.

What follows a block may be the next panel's. One function per code, for a choice inside the loops would cost half of
the speed. Lines come whole, or the first or second half of each.
"""

from typing import Any, NamedTuple

from quant.simd import kernel, load_u8x32, load_u8x64, prefetch
from quant.trellis_simd import (
    add_t10,
    add_t15,
    add_t20,
    first_nibbles,
    levels_t10,
    levels_t15,
    levels_t20,
    load_nibbles,
    second_nibbles,
)

AHEAD = 4096  # bytes: decoding is slow enough for a stream to need being asked for


@kernel
def _turned(panel, turn, chain):
    """The panel `turn` further on in a cyclic chain."""
    return (panel & -chain) | ((panel + turn) & (chain - 1))


@kernel
def _following(block, turn, blocks):
    """The block after `block`, and how many panels further on it is."""
    if block + 1 == blocks:
        return 0, turn + 1
    return block + 1, turn


# --- first bytes of a panel's lines: asks for what comes later, too --------------------------------------------------


@kernel
def _at_t20(data, tile, block, blocks, chain, panel):
    """Of streams e and o, and of what follows them."""
    after, turn = _following(block, 0, blocks)
    here, there = tile + 2048 * block + 128 * panel, tile + 2048 * after + 128 * _turned(panel, turn, chain)
    prefetch(data, here + AHEAD)
    prefetch(data, here + AHEAD + 64)
    return here, there, here + 64, there + 64


@kernel
def _at_t15(data, tile, block, blocks, chain, panel):
    """Of stream e and what follows it, of stream o (half a line) and what follows that."""
    after, turn = _following(block, 0, blocks)
    here, there, other = tile + 1536 * block, tile + 1536 * after, _turned(panel, turn, chain)
    prefetch(data, here + AHEAD + 96 * panel)
    prefetch(data, here + AHEAD + 96 * panel + 64)
    return here + 64 * panel, there + 64 * other, here + 1024 + 32 * panel, there + 1024 + 32 * other


@kernel
def _at_t10(data, tile, block, blocks, chain, panel):
    """Of stream e, what follows it, and what follows that."""
    after, turn = _following(block, 0, blocks)
    further, turns = _following(after, turn, blocks)
    here = tile + 1024 * block + 64 * panel
    prefetch(data, here + AHEAD)
    there = tile + 1024 * after + 64 * _turned(panel, turn, chain)
    return here, there, tile + 1024 * further + 64 * _turned(panel, turns, chain)


# --- the lines themselves, whole or a half of each -------------------------------------------------------------------


@kernel
def _whole_t20(data, at):
    return load_u8x64(data, at[0]), load_u8x64(data, at[1]), load_u8x64(data, at[2]), load_u8x64(data, at[3])


@kernel
def _whole_t15(data, at):
    return load_u8x64(data, at[0]), load_u8x64(data, at[1]), load_nibbles(data, at[2], at[3])


@kernel
def _whole_t10(data, at):
    return load_u8x64(data, at[0]), load_u8x64(data, at[1]), load_u8x64(data, at[2])


@kernel
def _first_t20(data, at):
    return load_u8x32(data, at[0]), load_u8x32(data, at[1]), load_u8x32(data, at[2]), load_u8x32(data, at[3])


@kernel
def _second_t20(data, at):
    return _first_t20(data, (at[0] + 32, at[1] + 32, at[2] + 32, at[3] + 32))


@kernel
def _first_t15(data, at):
    o = first_nibbles(load_u8x32(data, at[2]), load_u8x32(data, at[3]))
    return load_u8x32(data, at[0]), load_u8x32(data, at[1]), o


@kernel
def _second_t15(data, at):
    o = second_nibbles(load_u8x32(data, at[2]), load_u8x32(data, at[3]))
    return load_u8x32(data, at[0] + 32), load_u8x32(data, at[1] + 32), o


@kernel
def _first_t10(data, at):
    return load_u8x32(data, at[0]), load_u8x32(data, at[1]), load_u8x32(data, at[2])


@kernel
def _second_t10(data, at):
    return _first_t10(data, (at[0] + 32, at[1] + 32, at[2] + 32))


class Steps(NamedTuple):
    """A code's kernels: `at` gives what `whole`, `first` and `second` read for `levels` and `add`."""

    at: Any
    whole: Any
    first: Any
    second: Any
    levels: Any
    add: Any


STEPS_T20 = Steps(_at_t20, _whole_t20, _first_t20, _second_t20, levels_t20, add_t20)
STEPS_T15 = Steps(_at_t15, _whole_t15, _first_t15, _second_t15, levels_t15, add_t15)
STEPS_T10 = Steps(_at_t10, _whole_t10, _first_t10, _second_t10, levels_t10, add_t10)
