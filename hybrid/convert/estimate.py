"""What quantizing would give and take, without writing: sizes from the plan, hours from a short measurement."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid.checkpoint import Expert, Int4Weight
from hybrid.checkpoint.blob import MATRICES, Shapes
from hybrid.config import ModelConfig
from hybrid.convert.encode import LayerEncoder, encode_expert
from hybrid.convert.experts import worker_count
from hybrid.convert.plan import Plan, Settings, kv_room, make_plan
from hybrid.convert.run import HEADROOM, on_one_disk, space_needed
from hybrid.convert.source import read_source
from hybrid.device import default_threads
from hybrid.memory.hardware import disk_free

SAMPLE = 512  # rows and columns of the matrices that are encoded for the measurement


def estimate(
    source: Path, target: Path, settings: Settings, *, threads: int | None = None, delete_source: bool = False
) -> dict[str, Any]:
    """Sizes, formats, disk and time of a pack; JSON-ready. Encodes random matrices for some seconds.

    `kv_bytes` of memory were left to the KV cache of `ctx` tokens; 0 if they had no part in it.

    The time is that of the encoders without a calibration's feedback, on otherwise idle cores. Raises as `quantize`.
    """
    found = read_source(source)
    with found.open(finished=()) as checkpoint:
        plan = make_plan(found, checkpoint, settings)
        is_int4 = checkpoint.expert_format(found.config.moe_layers[0]) == "int4_g32"
    calibrated = settings.calibration is not None
    workers = worker_count(Shapes.of(found.config), threads or default_threads(), calibrated=calibrated)
    seconds = _encoding_seconds(found.config, plan, is_int4, workers)
    frees = delete_source and on_one_disk(found.directory, target)
    expert_bytes = sum(plan.layer_bytes(found.config).values())
    return {
        "routed_weights": found.config.routed_params,
        "expert_bytes": expert_bytes,
        "bits_per_weight": round(8 * expert_bytes / found.config.routed_params, 4),
        "resident": settings.resident,
        "resident_bytes": sum(plan.resident_bytes.values()),
        "ctx": min(settings.ctx, found.config.max_position_embeddings),
        "kv": settings.kv,
        "kv_bytes": kv_room(found.config, settings),
        "formats": {matrix: _count(plan, part) for part, matrix in enumerate(MATRICES)},
        "source_bytes": sum(found.sizes().values()),
        "disk_needed": HEADROOM + space_needed(found, plan.part_bytes(found.config), [], frees),
        "disk_free": disk_free(target),
        "workers": workers,
        "seconds": round(seconds, 1),
        "weights_per_s": round(found.config.routed_params / seconds),
    }


def _count(plan: Plan, part: int) -> dict[str, int]:
    return dict(sorted(Counter(pair[part] for pairs in plan.formats.values() for pair in pairs).items()))


def _encoding_seconds(config: ModelConfig, plan: Plan, is_int4: bool, workers: int) -> float:
    """Time to encode all experts, each format at the speed it reaches here with all workers busy."""
    matrix_weights = config.hidden_size * config.moe_intermediate_size
    weights: Counter[str] = Counter()
    for part, matrices in enumerate((2, 1)):
        for name, count in _count(plan, part).items():
            weights[name] += count * matrices * matrix_weights
    return sum(count / _speed(config, name, is_int4, workers) for name, count in weights.items())


def _speed(config: ModelConfig, format: str, is_int4: bool, workers: int) -> float:
    """Weights per second that `workers` threads encode together."""
    hidden, intermediate = min(SAMPLE, config.hidden_size), min(SAMPLE, config.moe_intermediate_size)
    encoder = LayerEncoder(0, Shapes((2 * intermediate, hidden), (hidden, intermediate)), 0, None)
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    expert = Expert(*(_random(*shape, is_int4) for shape in shapes))

    def work(index: int) -> None:
        encode_expert(encoder, index, expert, (format, format))

    work(0)  # compiles
    with ThreadPoolExecutor(workers) as pool:
        began = time.perf_counter()
        list(pool.map(work, range(workers)))
        elapsed = time.perf_counter() - began
    return workers * 3 * hidden * intermediate / elapsed


def _random(rows: int, columns: int, is_int4: bool) -> Int4Weight | torch.Tensor:
    rng = np.random.default_rng(rows + columns)
    if is_int4:
        scales = np.full((rows, columns // 32), 0x3C00, np.uint16)  # bf16 2^-7
        return Int4Weight(rng.integers(0, 256, (rows, columns // 2), np.uint8), scales)
    return torch.from_numpy(rng.standard_normal((rows, columns), np.float32)).to(torch.bfloat16)
