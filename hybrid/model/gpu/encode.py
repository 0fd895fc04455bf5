"""Rows on their way into our products, and how those are cut up."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hybrid.model.gpu import Launch
from hybrid.model.gpu.rows import COLUMNS, combine_rows, encode_rows, join_rows
from quant.rotation import block_size

ROWS = 128  # of a program of the products
FEW, MANY = 16, 64  # tokens that share a program's weights
FILL = 512  # programs that keep a card busy
LEAST = 8  # steps along the columns that are worth a program


class Halves(NamedTuple):
    """values * scales[:, None] are rows as the products take them."""

    values: Tensor  # fp16 [rows, columns]
    scales: Tensor  # fp32 [rows]


def parts_of(programs: int, steps: int) -> int:
    """Among how many programs to share a sum of `steps` steps, where there are `programs` sums."""
    parts = 1
    while programs * parts < FILL and steps >= 2 * parts * LEAST:
        parts *= 2
    return parts


def _shape(columns: int, rotated: bool) -> dict[str, int]:
    """How a kernel sees a row: blocks of a power of two, those of the rotation if there is one."""
    block = block_size(columns) if rotated else min(1024, triton.next_power_of_2(columns))
    rows = triton.next_power_of_2(triton.cdiv(columns, block))
    return {
        "ROWS": rows,
        "BLOCK": block,
        "STAGES": block.bit_length() - 1,
        "num_warps": min(16, max(4, rows * block // 1024)),
    }


def encode(launch: Launch, x: Tensor, sign: Tensor | None = None) -> Halves:
    """x [rows, columns] of any floating type; rotated by `sign` fp32 [columns] if there is one."""
    rows, columns = x.shape
    out = _empty(x, rows, columns)
    shape = _shape(columns, sign is not None)
    launch(encode_rows, (rows,), x.contiguous(), sign, *out, columns, ROTATED=sign is not None, **shape)
    return out


def join(launch: Launch, raw: Tensor, columns: int, sign: Tensor | None) -> Halves:
    """SwiGLU of a product raw fp32 [rows, parts, pitch] of gates and ups, rotated like `encode`."""
    rows, parts, pitch = raw.shape
    out = _empty(raw, rows, columns)
    shape = _shape(columns, sign is not None)
    launch(join_rows, (rows,), raw, sign, *out, parts, pitch, columns, ROTATED=sign is not None, **shape)
    return out


def combine(
    launch: Launch, raw: Tensor, y: Tensor, places: Tensor | None = None, weights: Tensor | None = None
) -> None:
    """y [tokens, columns] = each token's rows of raw fp32 [rows, parts, pitch], weighted if there are weights fp32."""
    tokens, columns = y.shape
    _, parts, pitch = raw.shape
    grid = tokens, triton.cdiv(columns, int(COLUMNS))
    terms = 1 if places is None else places.shape[1]
    launch(combine_rows, grid, raw, places, weights, y, parts, pitch, columns, TERMS=terms, WEIGHTED=places is not None)


def _empty(like: Tensor, rows: int, columns: int) -> Halves:
    values = torch.empty(rows, columns, dtype=torch.float16, device=like.device)
    return Halves(values, torch.empty(rows, dtype=torch.float32, device=like.device))
