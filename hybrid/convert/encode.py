"""One routed expert into the bytes a pack keeps: its two matrices, each encoded in the format the plan gives it."""

from typing import NamedTuple

import numpy as np
import torch

from hybrid.checkpoint import Expert, Int4Weight
from hybrid.checkpoint.blob import MATRICES, Formats, Shapes, int4_blocks
from hybrid.checkpoint.calibration import LayerStatistics
from hybrid.checkpoint.hf import Weight
from quant import int4_g32
from quant.aligned import empty
from quant.encode import Inputs, encode, inputs
from quant.kernels import interleave
from quant.rotation import signs
from quant.scales import from_bits


class LayerEncoder:
    """What the experts of one layer have in common."""

    def __init__(self, layer: int, shapes: Shapes, seed: int, statistics: LayerStatistics | None) -> None:
        """`statistics` of a calibration. Where they hold the inputs of gate_up, these are prepared here, once."""
        self.layer, self.shapes, self.seed, self.statistics = layer, shapes, seed, statistics
        rows, columns = shapes.gate_up
        common = hessian(statistics, "gate_up", 0)
        self._common = None if common is None else inputs(common, signs(seed, layer, "gate_up", columns), rows)

    def known(self, matrix: str, index: int, sign: np.ndarray, rows: int) -> Inputs | None:
        """What is known of the inputs of a matrix of expert `index`."""
        if matrix == "gate_up":
            return self._common
        own = hessian(self.statistics, matrix, index)
        return None if own is None else inputs(own, sign, rows)


class EncodedExpert(NamedTuple):
    """An expert's bytes, zeros up to a whole page included, and the relative errors of gate_up and down."""

    blob: np.ndarray  # uint8 [blob_bytes]
    errors: tuple[float, float]
    plain_errors: tuple[float, float]


class EncodedMatrix(NamedTuple):
    blob: np.ndarray  # uint8 [matrix_bytes]
    error: float
    plain_error: float


def encode_expert(layer: LayerEncoder, index: int, expert: Expert, formats: Formats) -> EncodedExpert:
    """Encode expert `index` of a layer. The same input gives the same bytes, whatever else is running."""
    sources: tuple[tuple[Weight, ...], ...] = ((expert.gate, expert.up), (expert.down,))
    encoded = [
        _int4(weights, shape) if format == "int4_g32" else _trellis(layer, index, matrix, weights, format)
        for matrix, weights, format, shape in zip(MATRICES, sources, formats, layer.shapes, strict=True)
    ]
    blob = empty((layer.shapes.blob_bytes(formats),))
    first, second = (matrix.blob for matrix in encoded)
    blob[: first.size], blob[first.size : first.size + second.size] = first, second
    blob[first.size + second.size :] = 0
    gate_up, down = encoded
    return EncodedExpert(
        blob,
        (_rounded(gate_up.error), _rounded(down.error)),
        (_rounded(gate_up.plain_error), _rounded(down.plain_error)),
    )


def _rounded(error: float) -> float:
    """To five digits: what the manifest keeps."""
    return float(f"{error:.4e}")


def _trellis(layer: LayerEncoder, index: int, matrix: str, weights: tuple[Weight, ...], format: str) -> EncodedMatrix:
    rows = _joined([full(weight) for weight in weights])
    sign = signs(layer.seed, layer.layer, matrix, rows.shape[1])
    encoded = encode(rows, format, sign, layer.known(matrix, index, sign, len(rows)))
    return EncodedMatrix(encoded.blob, encoded.error, encoded.plain_error)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return interleave(*parts) if len(parts) == 2 else parts[0]


def hessian(statistics: LayerStatistics | None, matrix: str, index: int) -> np.ndarray | None:
    """fp32 [columns, columns]: second moments of a matrix's input; None where nothing is known of it.

    Those of `down` belong to one expert: they are shrunk towards a multiple of the identity by how few tokens they come
    from, and diagonal where only the diagonal was kept.
    """
    if statistics is None or matrix == "gate_up":
        return statistics and statistics.hessian_x
    tokens, diagonal = int(statistics.counts[index]), statistics.importance_h[index]
    if tokens == 0:
        return None
    trust = tokens / (tokens + diagonal.size)
    whole = np.diag(diagonal) if statistics.hessian_h is None else statistics.hessian_h[index]
    even = np.eye(diagonal.size, dtype=np.float32) * np.float32(diagonal.mean())
    return (trust * whole + (1 - trust) * even).astype(np.float32)


def full(weight: Weight) -> np.ndarray:
    """fp32 [rows, columns] of a matrix of the source, exactly."""
    if isinstance(weight, torch.Tensor):
        return weight.float().numpy()
    assert isinstance(weight, Int4Weight)
    codes = np.stack([weight.packed & 15, weight.packed >> 4], axis=2).astype(np.float32) - int4_g32.ZERO
    groups = codes.reshape(*weight.scales.shape, -1)
    return (groups * from_bits(weight.scales)[:, :, None]).reshape(len(codes), -1)


def _int4(weights: tuple[Weight, ...], shape: tuple[int, int]) -> EncodedMatrix:
    """Without loss where the source is INT4 itself."""
    blocks, error = empty(int4_blocks(shape)), 0.0
    if isinstance(weights[0], Int4Weight):
        packed, scales = (_joined(list(arrays)) for arrays in zip(*weights, strict=True))
        int4_g32.pack(packed, scales, blocks)
    else:
        rows = _joined([full(weight) for weight in weights])
        int4_g32.pack(*int4_g32.encode(rows), blocks)
        lost = int4_g32.decode(blocks, shape[1]) - rows
        error = float(np.square(lost).sum() / max(float(np.square(rows).sum()), 1e-30))
    return EncodedMatrix(blocks.reshape(-1), error, error)
