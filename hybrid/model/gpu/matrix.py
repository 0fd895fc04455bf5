"""Resident matrices in int8_g32 or int4_g32 in the memory of a card; needs no Triton."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quant import linear

BITS = {"int8_g32": 8, "int4_g32": 4}


class CardMatrix(NamedTuple):
    """`quant.linear.Matrix` on a card, byte for byte."""

    bits: int
    blocks: Tensor  # uint8 [rows / 32 rounded up, ...]
    rows: int
    columns: int


def upload(matrix: linear.Matrix, device: torch.device) -> CardMatrix:
    return CardMatrix(BITS[matrix.format], torch.from_numpy(matrix.blocks).to(device), matrix.rows, matrix.columns)


def can_join(matrices: Sequence[CardMatrix]) -> bool:
    """Whether `join` takes them, as `quant.linear.can_join`."""
    alike = len({(matrix.bits, matrix.columns) for matrix in matrices}) == 1
    return alike and all(matrix.rows % linear.ROWS == 0 for matrix in matrices[:-1])


def join(matrices: Sequence[CardMatrix]) -> CardMatrix:
    """The matrices one below the other."""
    first, rows = matrices[0], sum(matrix.rows for matrix in matrices)
    return CardMatrix(first.bits, torch.cat([matrix.blocks for matrix in matrices]), rows, first.columns)
