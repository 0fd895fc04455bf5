"""The routed experts of one layer on a card, straight from the bytes of a pack: the launches of `quant.trellis_moe`.

    encode    per token: rotate, fp16
    multiply  gate and up of every pair of a token and an expert
    join      per pair: SwiGLU, rotate, fp16
    multiply  down
    combine   per token: the sum over its pairs, weighted

Only experts that are here contribute; what one lacks is the business of whoever splits the router's choice.
"""

from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from hybrid.model.gpu import Card, Launch
from hybrid.model.gpu.encode import FEW, ROWS, Halves, combine, encode, join, parts_of
from hybrid.model.gpu.groups import multiply_groups
from hybrid.model.gpu.trellis import multiply_trellis, tables
from quant import int4_g32, kernels, trellis_moe

SUMS_AT_ONCE = 64 << 20  # fp32 sums of gates and ups that exist at the same time


class Routed(NamedTuple):
    """The router's choices by ascending expert, so that each expert's weights are read once for several tokens."""

    experts: Tensor  # int64 [pairs]
    first: Tensor  # int64 [pairs], where each one's expert begins
    tokens: Tensor  # int64 [pairs]
    places: Tensor  # int64 [tokens, k], where each token's pairs went


def route(topk_ids: Tensor) -> Routed:
    """topk_ids int64 [tokens, k]; nothing waits for the card."""
    experts, order = topk_ids.flatten().sort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    first = torch.searchsorted(experts, experts)
    return Routed(experts, first, order // topk_ids.shape[1], places.view_as(topk_ids))


class TrellisMatrix(NamedTuple):
    """The same matrix of every expert, in trellis formats of their own."""

    planes: Tensor  # int64 [experts, 2, 3] as in `quant.trellis_moe.Matrices`; zeros for an expert that is not here
    sign: Tensor  # fp32 [columns]
    columns: int
    slabs: int
    blocks: int  # of 128 rows in a slab
    chain: int
    tiles: int
    tables: Tensor  # int8, `trellis.tables`

    def multiply(self, launch: Launch, data: Tensor, routed: Routed, rows: Tensor, x: Halves) -> Tensor:
        """fp32 [pairs, parts, padded rows]: each pair's expert times row rows[pair] of x."""
        pairs, programs = len(rows), self.slabs * self.blocks
        parts = parts_of(pairs * programs, self.tiles)
        raw = torch.empty(pairs, parts, ROWS * programs, dtype=torch.float32, device=data.device)
        launch(
            multiply_trellis, (pairs, programs, parts), data, data.view(torch.bfloat16), self.tables,
            self.planes, routed.experts, routed.first, rows, *x, raw, pairs, self.columns, self.tiles, self.blocks,
            self.chain, GROUP=FEW, num_warps=16,
        )  # fmt: skip
        return raw


class Int4Matrix(NamedTuple):
    """The same matrix of every expert in int4_g32."""

    starts: Tensor  # int64 [experts], bytes; -1 for an expert that is not here
    rows: int
    columns: int
    sign: None = None  # such weights are not rotated

    def multiply(self, launch: Launch, data: Tensor, routed: Routed, rows: Tensor, x: Halves) -> Tensor:
        """As `TrellisMatrix.multiply`."""
        pairs, programs = len(rows), triton.cdiv(self.rows, ROWS)
        parts = parts_of(pairs * programs, self.columns // 32)
        raw = torch.empty(pairs, parts, ROWS * programs, dtype=torch.float32, device=data.device)
        launch(
            multiply_groups, (pairs, programs, parts), data.view(torch.int32), data.view(torch.bfloat16), self.starts,
            routed.experts, routed.first, rows, *x, raw, pairs, self.columns, self.rows // int4_g32.ROWS, BITS=4,
            ROUTED=True, GROUP=FEW,
        )  # fmt: skip
        return raw


class GpuExperts:
    """A `LayerExperts` whose weights lie in the memory of a card."""

    def __init__(
        self,
        card: Card,
        data: Tensor,
        gate_up: TrellisMatrix | Int4Matrix,
        down: TrellisMatrix | Int4Matrix,
        expert_bytes: np.ndarray,
    ) -> None:
        """data uint8 on the card: where the matrices say their bytes are; a buffer of slots or a layer's blobs."""
        self.card = card
        self.data = data
        self.gate_up = gate_up
        self.down = down
        self.expert_bytes = expert_bytes

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Sum of the chosen experts that are here, weighted: x [tokens, hidden] -> fp32 [tokens, hidden]."""
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        tokens = max(1, SUMS_AT_ONCE // (2 * self.down.columns * topk_ids.shape[1]))
        for parts in zip(*(rows.split(tokens) for rows in (x, topk_ids, topk_weights, y)), strict=True):
            self._forward(*parts)
        return y

    def _forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, y: Tensor) -> None:
        launch, routed = self.card.launch, route(topk_ids)
        halves = encode(launch, x, self.gate_up.sign)
        raw = self.gate_up.multiply(launch, self.data, routed, routed.tokens, halves)
        inner = join(launch, raw, self.down.columns, self.down.sign)
        every = torch.arange(topk_ids.numel(), device=x.device)
        combine(launch, self.down.multiply(launch, self.data, routed, every, inner), y, routed.places, topk_weights)


def trellis_experts(card: Card, experts: trellis_moe.TrellisExperts, expert_bytes: np.ndarray) -> GpuExperts:
    """A whole layer of a pack, copied to the card."""
    gate_up, down = (trellis_matrix(card, matrix) for matrix in (experts.gate_up, experts.down))
    return GpuExperts(card, torch.from_numpy(experts.data).to(card.device), gate_up, down, expert_bytes)


def trellis_matrix(card: Card, matrix: trellis_moe.Matrices) -> TrellisMatrix:
    """Where the planes of every expert lie, on the card."""
    planes, sign, codes = (torch.from_numpy(array).to(card.device) for array in (matrix.planes, matrix.sign, tables()))
    blocks = matrix.steps // 8
    return TrellisMatrix(planes, sign, matrix.columns, matrix.slabs, blocks, matrix.chain, matrix.tiles, codes)


def int4_experts(card: Card, experts: kernels.Experts, hidden: int, intermediate: int) -> GpuExperts:
    """A whole layer of INT4 experts, copied to the card."""
    stacks = [stack.blocks.reshape(len(stack.blocks), -1) for stack in experts]
    data = torch.cat([torch.from_numpy(stack).to(card.device).flatten() for stack in stacks])
    count, (first, second) = len(stacks[0]), (stack.shape[1] for stack in stacks)
    places = torch.arange(count, device=card.device)
    gate_up = Int4Matrix(places * first, 2 * intermediate, hidden)
    down = Int4Matrix(count * first + places * second, hidden, intermediate)
    return GpuExperts(card, data, gate_up, down, np.full(count, first + second))
