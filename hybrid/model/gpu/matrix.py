"""Resident matrices in int8_g32 or int4_g32 in the memory of a card; needs no Triton."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quant import linear


class CardMatrix(NamedTuple):
    """`quant.linear.Matrix` on a card, byte for byte."""

    format: str
    blocks: Tensor  # uint8 [rows / 32 rounded up, ...]
    rows: int
    columns: int


def upload(matrix: linear.Matrix, device: torch.device) -> CardMatrix:
    return CardMatrix(matrix.format, torch.from_numpy(matrix.blocks).to(device), matrix.rows, matrix.columns)


def join(matrices: Sequence[CardMatrix]) -> CardMatrix:
    """The matrices one below the other, if `quant.linear.can_join` takes them."""
    first, rows = matrices[0], sum(matrix.rows for matrix in matrices)
    return CardMatrix(first.format, torch.cat([matrix.blocks for matrix in matrices]), rows, first.columns)
