"""Every routed expert on the host, in the layout its kernel reads, but for those that only a card has.

Of a pack perhaps fewer: see `tiers`.
"""

import math
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hybrid.checkpoint import Checkpoint, Expert, Int4Weight
from hybrid.checkpoint.blob import Formats
from hybrid.checkpoint.pack import Pack
from hybrid.config import ModelConfig
from hybrid.memory.direct import READERS, DirectFile
from hybrid.memory.many import ManyTokens, kernel_of
from hybrid.memory.tiers import NvmeTier
from quant import aligned, int4_g32, kernels, trellis_moe
from quant.gemm import Layer
from quant.rotation import MATRICES, signs

INT4: Formats = ("int4_g32", "int4_g32")


class LayerExperts(Protocol):
    """The routed experts of one layer."""

    @property
    def expert_bytes(self) -> np.ndarray:
        """Bytes read to apply each expert once, int64 [experts]."""
        ...

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Sum of the chosen experts, weighted: x [tokens, hidden] -> fp32 [tokens, hidden]."""
        ...


class PackedExperts:
    """Low-bit experts times int8 activations, by the Numba kernels; with `ManyTokens`, some by torch."""

    def __init__(
        self, moe: Callable[..., np.ndarray], expert_bytes: np.ndarray, places: np.ndarray | None = None
    ) -> None:
        """`moe` takes x, topk_ids and topk_weights and returns the layer's output: a kernel of `quant`, or
        `ManyTokens.moe`, of the layer that is its first argument. Where that has only some of all experts, places int64
        [experts] are their numbers there, and -1 for those it must not be asked for."""
        self.moe = moe
        self.expert_bytes = expert_bytes
        self.places = places

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        rows, ids = np.ascontiguousarray(x.float().numpy(force=True)), topk_ids.numpy(force=True)
        if self.places is not None:
            ids = self.places[ids]
            assert (ids >= 0).all(), "an expert that is only on the card"
        out = self.moe(rows, ids, topk_weights.numpy(force=True))
        return torch.from_numpy(out).to(x.device)


ObserveExpert = Callable[[int, Tensor, Tensor, Tensor], None]


def unobserved(expert: int, weights: Tensor, inner: Tensor, outputs: Tensor) -> None:
    """The default `observe`."""


class ExactExperts:
    """Experts in full precision by torch, one at a time: the path that others are checked against, and bf16 models'."""

    def __init__(self, expert: Callable[[int], tuple[Tensor, Tensor, Tensor]], expert_bytes: np.ndarray) -> None:
        """`expert(i)` returns gate, up [intermediate, hidden] and down [hidden, intermediate] in the model's dtype."""
        self.expert = expert
        self.expert_bytes = expert_bytes
        # Told of an expert applied: weights [n] of its tokens, inner [n, intermediate] and outputs fp32 [n, hidden].
        self.observe: ObserveExpert = unobserved

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in topk_ids.unique().tolist():
            rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up, down = self.expert(expert)
            inputs = x[rows].to(gate.dtype)
            inner = torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
            outputs, weights = (inner @ down.T).float(), topk_weights[rows, slots]
            self.observe(expert, weights, inner, outputs)
            out.index_add_(0, rows, outputs * weights[:, None])
        return out


class _How(NamedTuple):
    """A layer's experts are multiplied: by torch in `dtype` if `exact`, else by kernels and `many`."""

    exact: bool
    dtype: torch.dtype
    many: ManyTokens | None


def load_experts(
    checkpoint: Checkpoint,
    layer: int,
    *,
    exact: bool,
    dtype: torch.dtype,
    threads: int,
    tier: NvmeTier | None = None,
    pinned: np.ndarray | None = None,
    many: ManyTokens | None = None,
) -> LayerExperts:
    """The experts of one layer as their kernels read them; decoded and multiplied by torch instead if `exact`, and by
    `many`, which the tier has of its own, where a chunk has many tokens for one.

    With a `tier`, made of the same pack, nothing is read now. Those `pinned` bool [experts] to a card are not read.
    """
    if tier is not None:
        return PackedExperts(partial(tier.moe, layer), tier.expert_bytes(layer))
    assert pinned is None or not exact, "no card multiplies exactly"
    kept = np.arange(checkpoint.config.n_routed_experts) if pinned is None else np.flatnonzero(~pinned)
    how = _How(exact, dtype, many)
    with ThreadPoolExecutor(max(threads, READERS)) as pool:
        if isinstance(checkpoint, Pack):
            return _from_pack(checkpoint, layer, kept, how, pool)
        if checkpoint.expert_format(layer) == "int4_g32":
            return _from_int4(checkpoint, layer, kept, how, pool)
    assert pinned is None, "no card multiplies such experts"
    sizes = np.full(checkpoint.config.n_routed_experts, checkpoint.config.expert_bytes(16))
    return ExactExperts(lambda i: _dense(checkpoint.expert(layer, i), dtype), sizes)


def first_formats(checkpoint: Checkpoint) -> Formats | None:
    """Of the first routed expert; None where no kernel of ours multiplies it."""
    layers = checkpoint.config.moe_layers
    if layers and isinstance(checkpoint, Pack):
        return checkpoint.manifest.layers[layers[0]].formats[0]
    return INT4 if layers and checkpoint.expert_format(layers[0]) == "int4_g32" else None


def _places(kept: np.ndarray, experts: int) -> np.ndarray | None:
    """Where each of `experts` lies if only the `kept` ones, ascending, lie in a row; None if that is all of them."""
    if len(kept) == experts:
        return None
    places = np.full(experts, -1)
    places[kept] = np.arange(len(kept))
    return places


def _from_int4(checkpoint: Checkpoint, layer: int, kept: np.ndarray, how: _How, pool: Executor) -> LayerExperts:
    experts = _empty_int4(checkpoint.config, len(kept))
    list(pool.map(partial(_pack_released, checkpoint, layer, experts), kept.tolist(), range(len(kept))))
    packed = _int4_experts(experts, kept, checkpoint.config, how.many)
    if not how.exact:
        return packed
    hidden, intermediate = checkpoint.config.hidden_size, checkpoint.config.moe_intermediate_size
    return ExactExperts(lambda i: _decoded(experts, i, hidden, intermediate, how.dtype), packed.expert_bytes)


def _pack_released(checkpoint: Checkpoint, layer: int, experts: kernels.Experts, index: int, place: int) -> None:
    """Expert `index` of a released layer, packed into `place`."""
    gate, up, down = (_released(weight) for weight in checkpoint.expert(layer, index))
    both = [kernels.interleave(g, u) for g, u in zip(gate, up, strict=True)]
    int4_g32.pack(both[0], both[1], experts.gate_up.blocks[place])
    int4_g32.pack(*down, experts.down.blocks[place])


def _empty_int4(config: ModelConfig, count: int) -> kernels.Experts:
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    return kernels.Experts(int4_g32.empty(count, 2 * intermediate, hidden), int4_g32.empty(count, hidden, intermediate))


def _int4_experts(
    experts: kernels.Experts, kept: np.ndarray, config: ModelConfig, many: ManyTokens | None
) -> PackedExperts:
    size = sum(math.prod(matrix.blocks.shape[1:]) for matrix in experts)
    sizes, formats = np.full(config.n_routed_experts, size), [INT4] * len(kept)
    return PackedExperts(_applied(experts, formats, many), sizes, _places(kept, config.n_routed_experts))


def _applied(experts: Layer, formats: list[Formats], many: ManyTokens | None) -> Callable[..., np.ndarray]:
    """What computes a layer whose experts have these formats."""
    if many is None:
        return partial(kernel_of(experts), experts)
    return partial(many.moe, experts, formats)


def _from_pack(pack: Pack, layer: int, kept: np.ndarray, how: _How, pool: Executor) -> LayerExperts:
    """Blobs are read, not used where they could be mapped: the kernels must never wait for a page of a file."""
    record = pack.manifest.layers[layer]
    sizes = np.array([sum(pack.shapes.sizes(formats)) for formats in record.formats])
    if how.exact:
        return ExactExperts(lambda i: _dense(pack.expert(layer, i, how.dtype), how.dtype), sizes)
    with closing(DirectFile(pack.path / record.file)) as file:
        if record.formats[0][0] == "int4_g32":  # then all are
            return _int4_experts(_read_int4(pack, layer, kept, file, pool), kept, pack.config, how.many)
        data, starts = _read_blobs(pack, layer, kept, file, pool)
    gate_up, down = (
        matrix._replace(planes=np.ascontiguousarray(matrix.planes[kept]))
        for matrix in _trellis(pack, layer, data, starts)[1:]
    )
    experts = trellis_moe.TrellisExperts(data, gate_up, down)
    formats = [record.formats[expert] for expert in kept]
    return PackedExperts(_applied(experts, formats, how.many), sizes, _places(kept, len(sizes)))


def _trellis(pack: Pack, layer: int, data: np.ndarray, starts: np.ndarray) -> trellis_moe.TrellisExperts:
    """All experts of a layer, as if each began at its byte in `starts` int64 [experts] of `data`."""
    gate_up, down = (
        signs(pack.manifest.seed, layer, name, shape[1]) for name, shape in zip(MATRICES, pack.shapes, strict=True)
    )
    return trellis_moe.experts(data, starts, pack.manifest.layers[layer].formats, (gate_up, down))


def _read_blobs(
    pack: Pack, layer: int, kept: np.ndarray, file: DirectFile, pool: Executor
) -> tuple[np.ndarray, np.ndarray]:
    """The `kept` blobs of a layer one behind the other, uint8, verified if the pack is; and where each begins or would,
    int64 [experts]."""
    record = pack.manifest.layers[layer]
    sizes = np.zeros(len(record.offsets), np.int64)
    sizes[kept] = np.diff(record.offsets, append=record.size)[kept]
    starts, data = np.cumsum(sizes) - sizes, aligned.empty((int(sizes.sum()),))

    def read(index: int) -> None:
        blob = data[starts[index] :][: sizes[index]]
        file.read(int(record.offsets[index]), [blob])
        if pack.verify:
            pack.require_checksum(layer, index, [blob])

    list(pool.map(read, kept.tolist()))
    return data, starts


def _read_int4(pack: Pack, layer: int, kept: np.ndarray, file: DirectFile, pool: Executor) -> kernels.Experts:
    """The `kept` INT4 blobs, each into its places in the two stacks of their kernel; verified if the pack is."""
    experts, offsets = _empty_int4(pack.config, len(kept)), pack.manifest.layers[layer].offsets

    def read(index: int, place: int) -> None:
        parts = [stack.blocks[place].reshape(-1) for stack in experts]
        file.read(int(offsets[index]), parts)
        if pack.verify:
            pack.require_checksum(layer, index, parts)

    list(pool.map(read, kept.tolist(), range(len(kept))))
    return experts


# -- experts that never are in RAM ------------------------------------------------------------------------------------
class Stored(NamedTuple):
    """The routed experts of one layer where they are stored."""

    experts: trellis_moe.TrellisExperts | kernels.Experts  # all of the first kind, beginning at 0; none of the second
    read: Callable[[int], list[np.ndarray]]  # an expert's bytes, uint8, as its kernel lays them one behind the other


def stored_experts(checkpoint: Checkpoint, layer: int) -> Stored:
    """Of a pack or a released INT4 checkpoint. `read` raises CheckpointError when an expert cannot be read or, in a
    verified pack, is not what it should be."""
    if not isinstance(checkpoint, Pack):
        return Stored(_empty_int4(checkpoint.config, 0), partial(_packed_released, checkpoint, layer))
    formats = checkpoint.manifest.layers[layer].formats
    read = partial(_read_one, checkpoint, layer)
    if formats[0][0] == "int4_g32":
        return Stored(_empty_int4(checkpoint.config, 0), read)
    return Stored(_trellis(checkpoint, layer, aligned.empty((0,)), np.zeros(len(formats), np.int64)), read)


def _packed_released(checkpoint: Checkpoint, layer: int, index: int) -> list[np.ndarray]:
    experts = _empty_int4(checkpoint.config, 1)
    _pack_released(checkpoint, layer, experts, index, 0)
    return [stack.blocks.reshape(-1) for stack in experts]


def _read_one(pack: Pack, layer: int, index: int) -> list[np.ndarray]:
    record = pack.manifest.layers[layer]
    formats = record.formats[index]
    blob = aligned.empty((pack.shapes.blob_bytes(formats),))
    with closing(DirectFile(pack.path / record.file)) as file:
        file.read(int(record.offsets[index]), [blob])
    if pack.verify:
        pack.require_checksum(layer, index, [blob])
    return [blob[: sum(pack.shapes.sizes(formats))]]


def _released(weight: Int4Weight | Tensor) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(weight, Int4Weight)
    return weight.packed, weight.scales


def _dense(expert: Expert, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, down = expert
    assert isinstance(gate, Tensor) and isinstance(up, Tensor) and isinstance(down, Tensor)
    return gate.to(dtype), up.to(dtype), down.to(dtype)


def _decoded(
    experts: kernels.Experts, index: int, hidden: int, intermediate: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    gate_up = int4_g32.decode(experts.gate_up.blocks[index], hidden).reshape(-1, 2, 16, hidden)
    gate, up = (np.ascontiguousarray(gate_up[:, part]).reshape(-1, hidden) for part in (0, 1))
    down = int4_g32.decode(experts.down.blocks[index], intermediate)
    return torch.from_numpy(gate).to(dtype), torch.from_numpy(up).to(dtype), torch.from_numpy(down).to(dtype)
