"""Room in RAM for some of a pack's routed experts, of any layer, and the arithmetic on what lies there.

One allocation, cut into equal slots as large as the pack's largest expert. What a slot holds is told when it is filled;
kernels are given the few slots they are to multiply as if those were all experts of a layer.
"""

from functools import lru_cache
from typing import Protocol

import numpy as np

from hybrid.checkpoint.blob import Formats, Shapes
from hybrid.checkpoint.pack import Pack
from quant import aligned, int4_g32, kernels, trellis_moe
from quant.gemm import Layer
from quant.rotation import MATRICES, signs


class Slots(Protocol):
    """`count` slots, numbered from 0."""

    count: int

    def targets(self, slot: int, formats: Formats) -> list[np.ndarray]:
        """Where the bytes of an expert's blob belong, uint8, in order; padding at the blob's end may have no place."""
        ...

    def fill(self, slot: int, formats: Formats) -> None:
        """The slot's targets now hold an expert of these formats."""
        ...

    def multiply(self, layer: int, slots: np.ndarray, x: np.ndarray, places: np.ndarray) -> np.ndarray:
        """fp32 [pairs, hidden]: what the expert in slots[places[p]] makes of x[p], fp32 [pairs, hidden].

        Not weighted, and to the bit what its layer's kernel would have added: a sum over the experts of a token in
        their order is that kernel's result, however the pairs were spread over calls.
        """
        ...

    def experts(self, layer: int) -> Layer:
        """All slots as if they were the experts of a layer, whose numbers are those of the slots."""
        ...


def slot_bytes(pack: Pack) -> int:
    """Bytes of RAM that any expert of the pack fits in."""
    blob_bytes, sizes = pack.shapes.blob_bytes, pack.shapes.sizes
    return max(sum(sizes(formats)) if _is_int4(pack) else blob_bytes(formats) for formats in _formats(pack))


def open_slots(pack: Pack, count: int) -> Slots:
    """Slots for `count` experts of `pack`; memory is taken as they are filled."""
    return Int4Slots(pack.shapes, count) if _is_int4(pack) else TrellisSlots(pack, count)


def _formats(pack: Pack) -> set[Formats]:
    return {formats for record in pack.manifest.layers.values() for formats in record.formats}


def _is_int4(pack: Pack) -> bool:
    return next(iter(_formats(pack)))[0] == "int4_g32"  # then all are


class TrellisSlots:
    """Blobs as they lie in the file, each with the planes of its own formats."""

    def __init__(self, pack: Pack, count: int) -> None:
        self.count, self._size, self._shapes = count, slot_bytes(pack), pack.shapes
        self._data = aligned.empty((count * self._size,))
        self._planes = np.zeros((2, count, 2, 3), np.int64)  # of gate_up and down, see `trellis_moe.Matrices`
        self._matrices = {layer: _matrices(pack, layer) for layer in pack.config.moe_layers}
        self._planes_of = lru_cache(lambda formats: _planes_at_zero(pack.shapes, formats))

    def targets(self, slot: int, formats: Formats) -> list[np.ndarray]:
        return [self._data[slot * self._size :][: self._shapes.blob_bytes(formats)]]

    def fill(self, slot: int, formats: Formats) -> None:
        self._planes[:, slot] = self._planes_of(formats)
        self._planes[:, slot, :, 1:] += slot * self._size

    def multiply(self, layer: int, slots: np.ndarray, x: np.ndarray, places: np.ndarray) -> np.ndarray:
        gate_up, down = (
            matrix._replace(planes=planes)
            for matrix, planes in zip(self._matrices[layer], self._planes[:, slots], strict=True)
        )
        experts = trellis_moe.TrellisExperts(self._data, gate_up, down)
        return trellis_moe.moe(experts, x, places[:, None], np.ones((len(places), 1), np.float32))

    def experts(self, layer: int) -> Layer:
        gate_up, down = (
            matrix._replace(planes=planes) for matrix, planes in zip(self._matrices[layer], self._planes, strict=True)
        )
        return trellis_moe.TrellisExperts(self._data, gate_up, down)


def _matrices(pack: Pack, layer: int) -> list[trellis_moe.Matrices]:
    """gate_up and down of a layer, without experts."""
    return [
        trellis_moe.matrices([], np.zeros(0, np.int64), *shape, signs(pack.manifest.seed, layer, name, shape[1]))
        for name, shape in zip(MATRICES, pack.shapes, strict=True)
    ]


def _planes_at_zero(shapes: Shapes, formats: Formats) -> np.ndarray:
    """int64 [2, 2, 3]: the planes of an expert whose blob begins at byte 0."""
    starts = (0, shapes.sizes(formats)[0])
    return np.stack(
        [
            trellis_moe.matrices([name], np.array([start]), *shape, np.zeros(shape[1], np.int8)).planes[0]
            for name, start, shape in zip(formats, starts, shapes, strict=True)
        ]
    )


class Int4Slots:
    """A stack for each of the two matrices, as the INT4 kernels take them."""

    def __init__(self, shapes: Shapes, count: int) -> None:
        self.count = count
        self._experts = kernels.Experts(*(int4_g32.empty(count, *shape) for shape in shapes))
        self._stacks = [stack.blocks.reshape(count, -1) for stack in self._experts]

    def targets(self, slot: int, formats: Formats) -> list[np.ndarray]:
        return [stack[slot] for stack in self._stacks]

    def fill(self, slot: int, formats: Formats) -> None:
        pass  # where an expert begins is all there is to know

    def multiply(self, layer: int, slots: np.ndarray, x: np.ndarray, places: np.ndarray) -> np.ndarray:
        return kernels.moe(self._experts, x, slots[places][:, None], np.ones((len(places), 1), np.float32))

    def experts(self, layer: int) -> Layer:
        return self._experts
