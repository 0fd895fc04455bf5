"""Where eight steps of one panel begin, and their levels: block `block` of the tile at byte `tile` of `data`.

What follows a block may be the next panel's. One function per code, for a choice inside the loops would cost half of
the speed. Levels come for all 64 lanes at once, or for the first or second half of them.
"""

from quant.simd import kernel, load_u8x32, load_u8x64, prefetch
from quant.trellis_simd import first_nibbles, levels_t10, levels_t15, levels_t20, load_nibbles, second_nibbles

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
def lines_t20(data, tile, block, blocks, chain, panel):
    """Of streams e and o, and of what follows them."""
    after, turn = _following(block, 0, blocks)
    here, there = tile + 2048 * block + 128 * panel, tile + 2048 * after + 128 * _turned(panel, turn, chain)
    prefetch(data, here + AHEAD)
    prefetch(data, here + AHEAD + 64)
    return here, there, here + 64, there + 64


@kernel
def lines_t15(data, tile, block, blocks, chain, panel):
    """Of stream e and what follows it, of stream o (half a line) and what follows that."""
    after, turn = _following(block, 0, blocks)
    here, there, other = tile + 1536 * block, tile + 1536 * after, _turned(panel, turn, chain)
    prefetch(data, here + AHEAD + 96 * panel)
    prefetch(data, here + AHEAD + 96 * panel + 64)
    return here + 64 * panel, there + 64 * other, here + 1024 + 32 * panel, there + 1024 + 32 * other


@kernel
def lines_t10(data, tile, block, blocks, chain, panel):
    """Of stream e, what follows it, and what follows that."""
    after, turn = _following(block, 0, blocks)
    further, turns = _following(after, turn, blocks)
    here = tile + 1024 * block + 64 * panel
    prefetch(data, here + AHEAD)
    there = tile + 1024 * after + 64 * _turned(panel, turn, chain)
    return here, there, tile + 1024 * further + 64 * _turned(panel, turns, chain)


# --- levels of eight steps -------------------------------------------------------------------------------------------


@kernel
def whole_t20(data, at):
    return levels_t20(
        load_u8x64(data, at[0]), load_u8x64(data, at[1]), load_u8x64(data, at[2]), load_u8x64(data, at[3])
    )


@kernel
def whole_t15(data, at):
    return levels_t15(load_u8x64(data, at[0]), load_u8x64(data, at[1]), load_nibbles(data, at[2], at[3]))


@kernel
def whole_t10(data, at):
    return levels_t10(load_u8x64(data, at[0]), load_u8x64(data, at[1]), load_u8x64(data, at[2]))


@kernel
def _half_t20(data, at, skip):
    e, e1 = load_u8x32(data, at[0] + skip), load_u8x32(data, at[1] + skip)
    return levels_t20(e, e1, load_u8x32(data, at[2] + skip), load_u8x32(data, at[3] + skip))


@kernel
def first_t20(data, at):
    return _half_t20(data, at, 0)


@kernel
def second_t20(data, at):
    return _half_t20(data, at, 32)


@kernel
def first_t15(data, at):
    o = first_nibbles(load_u8x32(data, at[2]), load_u8x32(data, at[3]))
    return levels_t15(load_u8x32(data, at[0]), load_u8x32(data, at[1]), o)


@kernel
def second_t15(data, at):
    o = second_nibbles(load_u8x32(data, at[2]), load_u8x32(data, at[3]))
    return levels_t15(load_u8x32(data, at[0] + 32), load_u8x32(data, at[1] + 32), o)


@kernel
def _half_t10(data, at, skip):
    return levels_t10(
        load_u8x32(data, at[0] + skip), load_u8x32(data, at[1] + skip), load_u8x32(data, at[2] + skip)
    )


@kernel
def first_t10(data, at):
    return _half_t10(data, at, 0)


@kernel
def second_t10(data, at):
    return _half_t10(data, at, 32)
