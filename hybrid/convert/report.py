"""What a pack consists of and what it lost, from its manifest alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.checkpoint.blob import MATRICES
from hybrid.checkpoint.hf import model_directory
from hybrid.checkpoint.manifest import LayerRecord, is_pack, read_manifest
from hybrid.errors import CheckpointError


def summarise(path: Path) -> dict[str, Any]:
    """Totals, and per layer formats and relative errors; JSON-ready. Raises CheckpointError for anything but a pack."""
    directory = model_directory(path)
    if not is_pack(directory):
        raise CheckpointError(f"{path} is no pack.", "Name a directory that kimi-local quantize made.")
    manifest = read_manifest(directory)
    weights = manifest.routed_weights // max(1, len(manifest.layers))
    return {
        "path": str(directory),
        "routed_weights": manifest.routed_weights,
        "expert_bytes": manifest.expert_bytes,
        "resident_bytes": manifest.resident_bytes,
        "bits_per_weight": round(manifest.bits_per_weight, 4),
        "made_with": manifest.made_with,
        "error": _figures(np.concatenate([record.errors.ravel() for record in manifest.layers.values()])),
        "layers": [_layer(layer, record, weights) for layer, record in manifest.layers.items()],
    }


def _layer(layer: int, record: LayerRecord, weights: int) -> dict[str, Any]:
    matrices = {
        matrix: {
            "formats": dict(sorted(Counter(pair[part] for pair in record.formats).items())),
            "error": _figures(record.errors[:, part]),
            "plain_error": _figures(record.plain_errors[:, part]),
            "errors": record.errors[:, part].tolist(),
        }
        for part, matrix in enumerate(MATRICES)
    }
    return {"layer": layer, "bytes": record.size, "bits_per_weight": round(8 * record.size / weights, 4), **matrices}


def _figures(errors: np.ndarray) -> dict[str, float]:
    return {"mean": float(f"{errors.mean():.4e}"), "worst": float(errors.max())}
