"""The slots of an expert cache as the routed experts of a card.

Where kernels expect the numbers of experts they are given those of slots, so that one table serves all layers and only
the row of a filled slot changes. One more row, for the number that stands for no slot, says that nothing is here.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybrid.memory.expert_cache import ExpertCache, HostLayer
from hybrid.memory.expert_store import LayerExperts, PackedExperts, Stored
from hybrid.model.gpu import Card
from hybrid.model.gpu.experts import GpuExperts, Int4Matrix, trellis_matrix
from quant import kernels, trellis_moe


class TrellisTable(NamedTuple):
    """Where the planes of the expert in every slot lie, for gate_up and down."""

    planes: Tensor  # int64 [2, slots + 1, 2, 3], see `trellis_moe.Matrices`; zeros for what is not here
    slot_bytes: int

    def place(self, experts: trellis_moe.TrellisExperts, slot: int, expert: int) -> None:
        """`slot` holds `expert` of a layer now.

        Launches that read the row as it was are ahead of this write on their stream; those since the slot was emptied
        do not ask for it.
        """
        rows = np.stack([matrix.planes[expert] for matrix in experts[1:]])
        rows[:, :, 1:] += slot * self.slot_bytes - _start(experts, expert)
        self.planes[:, slot] = torch.from_numpy(rows).to(self.planes.device)


class CardSlots:
    """Makes `GpuExperts` of layers, all over the slots of one cache."""

    def __init__(self, card: Card, cache: ExpertCache) -> None:
        self.card = card
        self.cache = cache
        planes = torch.zeros(2, cache.count + 1, 2, 3, dtype=torch.int64, device=card.device)
        self._table = TrellisTable(planes, cache.slot_bytes)

    def add(self, layer: int, host: LayerExperts, stored: Stored | None = None) -> GpuExperts | None:
        """The experts of `layer` that are in slots, for slots in place of ids; None for a kind that no kernel takes.

        From now on the cache may choose among the experts of this layer: those of `host`, which keeps them all in RAM,
        or as they are `stored`.
        """
        held, sizes = _held(host) if stored is None else stored.experts, host.expert_bytes
        if isinstance(held, trellis_moe.TrellisExperts):
            read = partial(_blob, held, sizes) if stored is None else stored.read
            self.cache.add(layer, HostLayer(read, partial(self._table.place, held)))
            return self._trellis(held, sizes)
        if isinstance(held, kernels.Experts):
            read = partial(_stacked, held) if stored is None else stored.read
            self.cache.add(layer, HostLayer(read, lambda slot, expert: None))
            return self._int4(held, sizes)
        return None

    def _trellis(self, held: trellis_moe.TrellisExperts, expert_bytes: np.ndarray) -> GpuExperts:
        gate_up, down = (
            trellis_matrix(self.card, matrix)._replace(planes=planes)
            for matrix, planes in zip((held.gate_up, held.down), self._table.planes, strict=True)
        )
        return GpuExperts(self.card, self.cache.data, gate_up, down, expert_bytes)

    def _int4(self, held: kernels.Experts, expert_bytes: np.ndarray) -> GpuExperts:
        starts = torch.arange(self.cache.count + 1, device=self.card.device) * self.cache.slot_bytes
        behind = starts + math.prod(held.gate_up.blocks.shape[1:])
        starts[-1] = behind[-1] = -1
        hidden, intermediate = held.down.blocks.shape[1] * 32, held.gate_up.blocks.shape[1] * 16
        gate_up, down = Int4Matrix(starts, 2 * intermediate, hidden), Int4Matrix(behind, hidden, intermediate)
        return GpuExperts(self.card, self.cache.data, gate_up, down, expert_bytes)


def _held(host: LayerExperts) -> object:
    """What the kernel of a layer that is whole in RAM reads; None where no kernel of ours multiplies from there."""
    moe = host.moe if isinstance(host, PackedExperts) and host.places is None else None
    return moe.args[0] if isinstance(moe, partial) else None


def _start(experts: trellis_moe.TrellisExperts, expert: int) -> int:
    """Byte of `experts.data` that an expert begins at: with the scales of gate_up's first plane."""
    return int(experts.gate_up.planes[expert, 0, 1])


def _blob(experts: trellis_moe.TrellisExperts, expert_bytes: np.ndarray, expert: int) -> list[np.ndarray]:
    return [experts.data[_start(experts, expert) :][: int(expert_bytes[expert])]]


def _stacked(experts: kernels.Experts, expert: int) -> list[np.ndarray]:
    return [stack.blocks[expert].reshape(-1) for stack in experts]
