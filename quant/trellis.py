"""`trellis1` .. `trellis3`: matrices at 1, 1.5, 2, 2.5 and 3 bits per weight, in the order the kernels read them.

A matrix is one plane of a trellis code, or two: the second plane codes what the first left over. A plane is its row
scales followed by its bits. Trellis time runs down the rows, four columns (a panel) and sixteen rows side by side:

    slab    16 * steps rows, at most 2048; rows are padded to whole slabs
    panel   4 columns; lane 4g + c of step t holds row 16t + g of the slab, column c of the panel
    chain   1, 2, 4 or 8 neighbouring panels whose steps follow each other as one cyclic sequence, so that short slabs
            still have sequences of 64 steps and more
    tile    16 panels; columns are padded to whole tiles

    plane   bf16 scales [rows padded], padded to 64 bytes
            bits [slabs, tiles, steps / 8, block]
    block   eight steps of a tile, panel after panel: 64 bytes of stream e, byte l = the eight bits of lane l, and
            for T20 as many of stream o. T15 has stream e of all panels first, then 32 bytes of o for each, byte i =
            four bits of lane i and four of lane i + 32

So every kernel reads one unbroken stream, keeps its sums in registers over a tile, and meets each block twice: once as
the continuation of the block before it.
"""

from typing import NamedTuple

import numpy as np

from quant.activations import SPAN, Spans
from quant.codes import T10, T15, T20, Code, levels
from quant.scales import from_bits

TRELLIS = {
    "trellis1": (T10,),
    "trellis1_5": (T15,),
    "trellis2": (T20,),
    "trellis2_5": (T15, T10),
    "trellis3": (T20, T10),
}
LANES, PANELS, COLUMNS = 64, 16, 64  # columns: of a tile
LONGEST, SHORTEST = 128, 64  # steps of a sequence


class Layout(NamedTuple):
    """How a matrix of some shape is cut up."""

    rows: int
    columns: int
    slabs: int
    steps: int  # of a slab, a multiple of eight
    chain: int  # panels per sequence
    tiles: int

    @property
    def padded_rows(self) -> int:
        return self.slabs * self.steps * 16

    @property
    def scale_bytes(self) -> int:
        return -(-2 * self.padded_rows // 64) * 64

    def slab_bytes(self, code: Code) -> int:
        return self.tiles * self.steps * 16 * code.halves * 4

    def plane_bytes(self, code: Code) -> int:
        return self.scale_bytes + self.slabs * self.slab_bytes(code)


def layout(rows: int, columns: int) -> Layout:
    """Slabs as equal as possible, none longer than LONGEST steps; chains of at least SHORTEST steps."""
    groups = -(-rows // 16)
    slabs = -(-groups // LONGEST)
    steps = -(-groups // (8 * slabs)) * 8
    chain = 1
    while chain * steps < SHORTEST:
        chain *= 2
    return Layout(rows, columns, slabs, steps, chain, -(-columns // COLUMNS))


def matrix_bytes(name: str, rows: int, columns: int) -> int:
    """Bytes of a matrix, scales and padding included; a multiple of 64."""
    shape = layout(rows, columns)
    return sum(shape.plane_bytes(code) for code in TRELLIS[name])


class Plane(NamedTuple):
    """One plane's bytes as arrays."""

    code: Code
    scales: np.ndarray  # uint16 [padded rows], bits of bf16
    bits: np.ndarray  # uint8 [slabs, tiles, steps / 8, block bytes]


def planes(name: str, blob: np.ndarray, shape: Layout) -> list[Plane]:
    """Views of the planes of a matrix, uint8 [matrix_bytes]."""
    found: list[Plane] = []
    start = 0
    for code in TRELLIS[name]:
        part = blob[start : start + shape.plane_bytes(code)]
        scales = part[: 2 * shape.padded_rows].view(np.uint16)
        bits = part[shape.scale_bytes :].reshape(shape.slabs, shape.tiles, shape.steps // 8, -1)
        found.append(Plane(code, scales, bits))
        start += shape.plane_bytes(code)
    return found


# --- bits <-> sequences ----------------------------------------------------------------------------------------------


def _by_chain(lines: np.ndarray, shape: Layout) -> np.ndarray:
    """[slabs, tiles, blocks, 16 panels, 64 lanes, bits] -> [slabs, tiles, chains, lanes, steps of the sequence]."""
    slabs, tiles, blocks, panels, lanes, bits = lines.shape
    split = lines.reshape(slabs, tiles, blocks, panels // shape.chain, shape.chain, lanes, bits)
    return split.transpose(0, 1, 3, 5, 4, 2, 6).reshape(
        slabs, tiles, panels // shape.chain, lanes, shape.chain * blocks * bits
    )


def _by_block(streams: np.ndarray, shape: Layout, bits: int) -> np.ndarray:
    """The inverse of `_by_chain`."""
    slabs, tiles, chains, lanes, _ = streams.shape
    split = streams.reshape(slabs, tiles, chains, lanes, shape.chain, shape.steps // 8, bits)
    return split.transpose(0, 1, 5, 2, 4, 3, 6).reshape(slabs, tiles, shape.steps // 8, PANELS, lanes, bits)


def _lines(plane: Plane) -> tuple[np.ndarray, np.ndarray]:
    """Views of stream e [.., panels, 64] and of stream o [.., panels, bytes]."""
    head, code = plane.bits.shape[:3], plane.code
    if code is T15:
        middle = PANELS * LANES
        return plane.bits[..., :middle].reshape(*head, PANELS, LANES), plane.bits[..., middle:].reshape(
            *head, PANELS, 32
        )
    lines = plane.bits.reshape(*head, PANELS, -1)
    return lines[..., :LANES], lines[..., LANES:]


def unpack(plane: Plane, shape: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Streams e and o of a plane: bits uint8 [slabs, tiles, chains, lanes, steps of the sequence (or fewer for o)]."""
    head = plane.bits.shape[:3]
    lines_e, lines_o = _lines(plane)
    e = np.unpackbits(lines_e.reshape(*head, PANELS, LANES, 1), axis=-1, bitorder="little")
    if plane.code is T20:
        o = np.unpackbits(lines_o.reshape(*head, PANELS, LANES, 1), axis=-1, bitorder="little")
    elif plane.code is T15:
        halves = lines_o.reshape(*head, PANELS, 32)
        nibbles = np.concatenate((halves, halves >> 4), axis=-1)[..., None]
        o = np.unpackbits(nibbles, axis=-1, count=4, bitorder="little")
    else:
        o = np.empty((*head, PANELS, LANES, 0), np.uint8)
    return _by_chain(e, shape), _by_chain(o, shape)


def pack(e: np.ndarray, o: np.ndarray, plane: Plane, shape: Layout) -> None:
    """The inverse of `unpack`: write streams into `plane.bits`."""
    lines_e, lines_o = _lines(plane)
    lines_e[:] = np.packbits(_by_block(e, shape, 8), axis=-1, bitorder="little").reshape(lines_e.shape)
    if plane.code is T10:
        return
    bytes_o = np.packbits(_by_block(o, shape, plane.code.odd_stream), axis=-1, bitorder="little")
    if plane.code is T15:
        bytes_o = bytes_o[..., :32, :] | np.left_shift(bytes_o[..., 32:, :], np.uint8(4))
    lines_o[:] = bytes_o.reshape(lines_o.shape)


def to_matrix(values: np.ndarray, shape: Layout) -> np.ndarray:
    """[slabs, tiles, chains, lanes, steps of the sequence] -> [padded rows, padded columns]."""
    slabs, tiles, chains, _, _ = values.shape
    split = values.reshape(slabs, tiles, chains, 16, 4, shape.chain, shape.steps)
    return split.transpose(0, 6, 3, 1, 2, 5, 4).reshape(shape.padded_rows, shape.tiles * COLUMNS)


# --- meaning ---------------------------------------------------------------------------------------------------------


def plane_levels(plane: Plane, shape: Layout) -> np.ndarray:
    """Levels less the code's zero, int32 [padded rows, padded columns]."""
    return to_matrix(levels(plane.code, *unpack(plane, shape)), shape).astype(np.int32) - plane.code.zero


def plane_scales(plane: Plane) -> np.ndarray:
    """fp32 [padded rows]."""
    return from_bits(plane.scales)


def decode(name: str, blob: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The meaning of a matrix's bytes, in the rotated basis: fp32 [rows, columns]."""
    shape = layout(rows, columns)
    total = np.zeros((shape.padded_rows, shape.tiles * COLUMNS), np.float32)
    for plane in planes(name, blob, shape):
        total += plane_levels(plane, shape) * plane_scales(plane)[:, None]
    return total[:rows, :columns]


def multiply(name: str, blob: np.ndarray, rows: int, x: Spans) -> np.ndarray:
    """What the kernels compute, bit for bit, in NumPy: fp32 [tokens, rows] of one matrix times rotated int8 `x`.

    Per plane and span of columns the integer product is exact; it is scaled by fl(row scale * activation scale) and
    added, span after span and plane after plane, in fp32.
    """
    tokens, columns = x.values.shape
    shape = layout(rows, columns)
    y = np.zeros((tokens, shape.padded_rows), np.float32)
    for plane in planes(name, blob, shape):
        weights, scales = plane_levels(plane, shape), plane_scales(plane)
        for index in range(x.scales.shape[1]):
            part = slice(index * SPAN, (index + 1) * SPAN)
            dots = x.values[:, part].astype(np.int32) @ weights[:, part].T
            y += dots.astype(np.float32) * (scales * x.scales[:, index, None])
    return y[:, :rows]
