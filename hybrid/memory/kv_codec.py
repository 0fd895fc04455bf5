"""Latent rows as bytes and back: per tile of latent values one fp32 scale, and a code of eight bits for each.

A scale is such that the largest value of its tile gets the largest code, so a value is off by at most half a step: of
int8 that is 1/254 of the largest value; of fp8 (e4m3: four bits of exponent, three of mantissa) 1/16 of the value
itself, or 2^-10 of the scale if that is more. A tile of zeros gives zeros. One with anything that is no finite number
gives NaN throughout, which whoever looks at logits notices.
"""

import torch
from torch import Tensor

from hybrid.memory.kv_format import KVFormat
from quant import kv_rows

LARGEST = {"fp8": 448.0, "int8": 127.0}  # codes
CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
SMALLEST = torch.finfo(torch.float32).tiny  # scale


def encode(rows: Tensor, format: KVFormat) -> Tensor:
    """[tokens, rank + rope] of any floating type -> uint8 [tokens, row_bytes]; the same bytes on any device."""
    latent, rotated = rows.split([format.rank, format.rope], dim=-1)
    tiles = latent.float().unflatten(-1, (format.tiles, format.tile))
    scales = (tiles.abs().amax(dim=-1) / LARGEST[format.kind]).clamp_min_(SMALLEST)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    units = (tiles / scales.unsqueeze(-1)).nan_to_num_(0.0)
    codes = (units if format.kind == "fp8" else units.round_()).to(CODES[format.kind]).flatten(-2)
    parts = [part.contiguous().view(torch.uint8) for part in (scales, rotated.to(torch.bfloat16), codes)]
    return torch.cat([*parts, parts[0].new_zeros(len(rows), format.padding)], dim=-1)


def decode(stored: Tensor, format: KVFormat, dtype: torch.dtype) -> Tensor:
    """uint8 [tokens, row_bytes] -> [tokens, rank + rope]: code times scale in fp32, rounded to `dtype`."""
    scales, rotated, codes = planes(stored, format)
    if stored.device.type == "cpu" and dtype in (torch.bfloat16, torch.float32):
        rows = torch.empty(len(stored), format.rank + format.rope, dtype=dtype)
        rows[:, format.rank :] = rotated
        out = (rows if dtype == torch.float32 else rows.view(torch.int16)).numpy()
        kv_rows.decode(format.kind, stored.numpy(), format.codes_at, format.rank, scales.numpy(), out)
        return rows
    values = codes.view(CODES[format.kind]).float().unflatten(-1, (format.tiles, format.tile))
    values.mul_(scales.unsqueeze(-1))
    return torch.cat((values.flatten(-2).to(dtype), rotated.to(dtype)), dim=-1)


def planes(stored: Tensor, format: KVFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Views of uint8 [tokens, row_bytes]: fp32 [tokens, tiles], bf16 [tokens, rope], uint8 [tokens, rank]."""
    sizes = [format.rotated_at, format.codes_at - format.rotated_at, format.rank, format.padding]
    scales, rotated, codes, _ = stored.split(sizes, dim=1)
    return scales.view(torch.float32), rotated.view(torch.bfloat16), codes
