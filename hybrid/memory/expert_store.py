"""Every routed expert on the host, in the layout its kernel reads; of a pack perhaps only some, see `tiers`."""

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hybrid.checkpoint import Checkpoint, Expert, Int4Weight
from hybrid.checkpoint.pack import Pack
from hybrid.config import ModelConfig
from hybrid.memory.direct import PIECE, READERS, DirectFile
from hybrid.memory.tiers import NvmeTier
from quant import aligned, int4_g32, kernels, trellis_moe
from quant.rotation import MATRICES, signs


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
    """Low-bit experts times int8 activations, by the Numba kernels."""

    def __init__(self, moe: Callable[..., np.ndarray], expert_bytes: np.ndarray) -> None:
        """`moe` takes x, topk_ids and topk_weights and returns the layer's output: `quant.kernels.moe` of some experts
        or `quant.trellis_moe.moe` of others."""
        self.moe = moe
        self.expert_bytes = expert_bytes

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        rows = np.ascontiguousarray(x.float().numpy(force=True))
        out = self.moe(rows, topk_ids.numpy(force=True), topk_weights.numpy(force=True))
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


def load_experts(
    checkpoint: Checkpoint, layer: int, *, exact: bool, dtype: torch.dtype, threads: int, tier: NvmeTier | None = None
) -> LayerExperts:
    """The experts of one layer as their kernels read them; decoded and multiplied by torch instead if `exact`.

    With a `tier`, made of the same pack, nothing is read now.
    """
    if tier is not None:
        return PackedExperts(partial(tier.moe, layer), tier.expert_bytes(layer))
    with ThreadPoolExecutor(max(threads, READERS)) as pool:
        if isinstance(checkpoint, Pack):
            return _from_pack(checkpoint, layer, exact, dtype, pool)
        if checkpoint.expert_format(layer) == "int4_g32":
            return _from_int4(checkpoint, layer, exact, dtype, pool)
    sizes = np.full(checkpoint.config.n_routed_experts, checkpoint.config.expert_bytes(16))
    return ExactExperts(lambda i: _dense(checkpoint.expert(layer, i), dtype), sizes)


def _from_int4(checkpoint: Checkpoint, layer: int, exact: bool, dtype: torch.dtype, pool: Executor) -> LayerExperts:
    experts = _empty_int4(checkpoint.config)

    def pack(index: int) -> None:
        gate, up, down = (_released(weight) for weight in checkpoint.expert(layer, index))
        both = [kernels.interleave(g, u) for g, u in zip(gate, up, strict=True)]
        int4_g32.pack(both[0], both[1], experts.gate_up.blocks[index])
        int4_g32.pack(*down, experts.down.blocks[index])

    list(pool.map(pack, range(checkpoint.config.n_routed_experts)))
    packed = _int4_experts(experts)
    if not exact:
        return packed
    hidden, intermediate = checkpoint.config.hidden_size, checkpoint.config.moe_intermediate_size
    return ExactExperts(lambda i: _decoded(experts, i, hidden, intermediate, dtype), packed.expert_bytes)


def _empty_int4(config: ModelConfig) -> kernels.Experts:
    count, hidden, intermediate = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    return kernels.Experts(int4_g32.empty(count, 2 * intermediate, hidden), int4_g32.empty(count, hidden, intermediate))


def _int4_experts(experts: kernels.Experts) -> PackedExperts:
    size = sum(matrix.blocks[0].nbytes for matrix in experts)
    return PackedExperts(partial(kernels.moe, experts), np.full(len(experts.down.blocks), size))


def _from_pack(pack: Pack, layer: int, exact: bool, dtype: torch.dtype, pool: Executor) -> LayerExperts:
    """Blobs are read, not used where they could be mapped: the kernels must never wait for a page of a file."""
    record = pack.manifest.layers[layer]
    sizes = np.array([sum(pack.shapes.sizes(formats)) for formats in record.formats])
    if exact:
        return ExactExperts(lambda i: _dense(pack.expert(layer, i, dtype), dtype), sizes)
    with closing(DirectFile(pack.path / record.file)) as file:
        if record.formats[0][0] == "int4_g32":  # then all are
            return _int4_experts(_read_int4(pack, layer, file, pool))
        data = _read_blobs(pack, layer, file, pool)
    gate_up, down = (
        signs(pack.manifest.seed, layer, name, shape[1]) for name, shape in zip(MATRICES, pack.shapes, strict=True)
    )
    experts = trellis_moe.experts(data, record.offsets, record.formats, (gate_up, down))
    return PackedExperts(partial(trellis_moe.moe, experts), sizes)


def _read_blobs(pack: Pack, layer: int, file: DirectFile, pool: Executor) -> np.ndarray:
    """A layer's file, uint8, verified if the pack is."""
    record = pack.manifest.layers[layer]
    data = aligned.empty((record.size,))
    list(pool.map(lambda start: file.read(start, [data[start : start + PIECE]]), range(0, data.size, PIECE)))
    if pack.verify:
        blobs = np.split(data, record.offsets[1:])
        list(pool.map(lambda i: pack.require_checksum(layer, i, [blobs[i]]), range(len(blobs))))
    return data


def _read_int4(pack: Pack, layer: int, file: DirectFile, pool: Executor) -> kernels.Experts:
    """A layer's INT4 blobs, each into its places in the two stacks of their kernel; verified if the pack is."""
    experts, offsets = _empty_int4(pack.config), pack.manifest.layers[layer].offsets

    def read(index: int) -> None:
        parts = [stack.blocks[index].reshape(-1) for stack in experts]
        file.read(int(offsets[index]), parts)
        if pack.verify:
            pack.require_checksum(layer, index, parts)

    list(pool.map(read, range(len(offsets))))
    return experts


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
