"""A resident matrix in int8_g32 or int4_g32 times rows, on a card: projections, dense MLPs, shared expert, head."""

import torch
import triton
from torch import Tensor

from hybrid.model.gpu import Launch
from hybrid.model.gpu.encode import FEW, MANY, ROWS, combine, encode, parts_of
from hybrid.model.gpu.groups import multiply_groups
from hybrid.model.gpu.matrix import CardMatrix

BITS = {"int8_g32": 8, "int4_g32": 4}
AT_ONCE = 1024  # tokens whose fp32 sums exist at the same time


def multiply(launch: Launch, matrix: CardMatrix, x: Tensor) -> Tensor:
    """x [tokens, columns] -> [tokens, rows] in its type; weights are exact, x is rounded to fp16."""
    y = torch.empty(len(x), matrix.rows, dtype=x.dtype, device=x.device)
    for part, out in zip(x.split(AT_ONCE), y.split(AT_ONCE), strict=True):
        _multiply(launch, matrix, part, out)
    return y


def _multiply(launch: Launch, matrix: CardMatrix, x: Tensor, y: Tensor) -> None:
    halves, tokens = encode(launch, x), len(x)
    group = FEW if tokens <= FEW else MANY
    tiles = len(matrix.blocks)
    sums, blocks = triton.cdiv(tokens, group), triton.cdiv(32 * tiles, ROWS)
    parts = parts_of(sums * blocks, matrix.columns // 32)
    raw = torch.empty(tokens, parts, ROWS * blocks, dtype=torch.float32, device=x.device)
    views = matrix.blocks.view(torch.int32), matrix.blocks.view(torch.bfloat16)
    launch(
        multiply_groups, (sums, blocks, parts), *views, None, None, None, None, *halves, raw, tokens, matrix.columns,
        tiles, BITS=BITS[matrix.format], ROUTED=False, GROUP=group, num_warps=4 if group == FEW else 8,
    )  # fmt: skip
    combine(launch, raw, y)
