"""One routed expert as a pack keeps it: a blob of two matrices, and what its bytes mean.

    blob   gate_up [2 * intermediate, hidden]   sixteen rows of gate and the same sixteen of up in turn
           down    [hidden, intermediate]
           zeros up to a multiple of 4 KiB

Each of the two is in a format of its own: one of `quant.LADDER`, or "int4_g32".
"""

import math
from typing import NamedTuple

import numpy as np
import torch

import quant
from hybrid.config import ModelConfig
from quant import int4_g32, trellis
from quant.aligned import PAGE
from quant.rotation import rotate_back, signs

MATRICES = ("gate_up", "down")
FORMATS = (*quant.LADDER, "int4_g32")

Formats = tuple[str, str]  # of gate_up and of down


class Shapes(NamedTuple):
    """(rows, columns) of the two matrices of an expert."""

    gate_up: tuple[int, int]
    down: tuple[int, int]

    @classmethod
    def of(cls, config: ModelConfig) -> "Shapes":
        hidden, intermediate = config.hidden_size, config.moe_intermediate_size
        return cls((2 * intermediate, hidden), (hidden, intermediate))

    def sizes(self, formats: Formats) -> tuple[int, int]:
        """Bytes of the two matrices."""
        return matrix_bytes(formats[0], self.gate_up), matrix_bytes(formats[1], self.down)

    def blob_bytes(self, formats: Formats) -> int:
        return padded(sum(self.sizes(formats)))


def matrix_bytes(format: str, shape: tuple[int, int]) -> int:
    """Bytes of one matrix [rows, columns], scales included; a multiple of 64."""
    return math.prod(int4_blocks(shape)) if format == "int4_g32" else trellis.matrix_bytes(format, *shape)


def padded(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def place(shapes: Shapes, formats: list[Formats]) -> tuple[np.ndarray, int]:
    """Where the experts of one layer lie in its file, one behind the other: offsets int64 [experts], and its bytes."""
    size_of = {pair: shapes.blob_bytes(pair) for pair in set(formats)}
    ends = np.cumsum([size_of[pair] for pair in formats], dtype=np.int64)
    return np.concatenate([np.zeros(1, np.int64), ends[:-1]]), int(ends[-1])


def decode_matrix(blob: np.ndarray, format: str, shape: tuple[int, int], signs: np.ndarray) -> np.ndarray:
    """fp32 [rows, columns] of one matrix, uint8 [matrix_bytes]; `signs` int8 [columns] are those of its rotation."""
    rows, columns = shape
    if format == "int4_g32":
        return int4_g32.decode(blob.reshape(int4_blocks(shape)), columns)
    return rotate_back(trellis.decode(format, blob, rows, columns), signs)


def int4_blocks(shape: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the blocks of one int4_g32 matrix."""
    rows, columns = shape
    return rows // int4_g32.ROWS, -(-columns // int4_g32.COLUMNS), 2, int4_g32.HALF


def decode_blob(
    blob: np.ndarray, formats: Formats, shapes: Shapes, seed: int, layer: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate, up [intermediate, hidden] and down [hidden, intermediate] in `dtype` of a blob, uint8 [blob_bytes]."""
    first, second = shapes.sizes(formats)
    parts = (blob[:first], blob[first : first + second])
    both, down = (
        decode_matrix(part, format, shape, signs(seed, layer, matrix, shape[1]))
        for part, format, shape, matrix in zip(parts, formats, shapes, MATRICES, strict=True)
    )
    turns = torch.from_numpy(both).to(dtype).reshape(-1, 2, 16, both.shape[1])
    gate, up = (turns[:, part].reshape(-1, both.shape[1]) for part in (0, 1))
    return gate, up, torch.from_numpy(down).to(dtype)
