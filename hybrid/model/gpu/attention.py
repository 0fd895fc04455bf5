"""Decode attention on a card: the launches that attend to what a step's tokens see."""

import torch
import triton
from torch import Tensor

from hybrid.memory.kv_codec import planes
from hybrid.memory.kv_format import PAGE_SIZE, KVFormat
from hybrid.model.batch import Seen
from hybrid.model.gpu import Launch
from hybrid.model.gpu.encode import FILL
from hybrid.model.gpu.latent import attend_pages, merge_parts

HEADS, ROWS = 16, 32  # of a program; rows at a time
CODED_ROWS = 16  # where they are decoded, which takes registers
LEAST_ROWS, MOST_PARTS = 256, 64


def decode(launch: Launch, queries: Tensor, cache: Tensor, seen: Seen, format: KVFormat, scale: float) -> Tensor:
    """Latents summed by weight, [tokens, heads, rank], for queries [tokens, heads, latent_dim].

    cache is one layer's rows [slots, ..], kept in `format`; `scale` multiplies the scores.
    """
    tokens, heads, _ = queries.shape
    rank, rope = format.rank, format.rope
    if format.reduced:
        scales, rotated, latents = planes(cache, format)
    else:
        latents, rotated = cache.split([rank, rope], dim=1)
        scales = latents  # stands for what values do not have, and is not read
    rows = min(CODED_ROWS if format.reduced else ROWS, PAGE_SIZE)
    parts = _parts(tokens * triton.cdiv(heads, HEADS), seen.longest)
    sums = torch.empty(tokens, heads, parts, rank, dtype=torch.float32, device=queries.device)
    weights = torch.empty(tokens, heads, parts, dtype=torch.float32, device=queries.device)
    launch(
        attend_pages, (tokens, triton.cdiv(heads, HEADS), parts), queries.contiguous(), latents, scales, rotated,
        *seen[:3], sums, weights, scale, heads, seen.tables.shape[1], HEADS=HEADS, ROWS=rows, RANK=rank,
        ROPE=rope, KIND=format.kind if format.reduced else "values", TILES=format.tiles,
        ROW_BYTES=cache.shape[1] * cache.element_size(), WIDE=queries.device.type == "cpu",
    )  # fmt: skip
    context = torch.empty(tokens, heads, rank, dtype=queries.dtype, device=queries.device)
    launch(merge_parts, (tokens, heads), sums, weights, context, heads, PARTS=parts, RANK=rank)
    return context


def _parts(programs: int, longest: int) -> int:
    parts = 1
    while programs * parts < FILL and parts < MOST_PARTS and longest > parts * LEAST_ROWS:
        parts *= 2
    return parts
