"""Kernels against the machine: whole experts at full size, out of memory no cache holds, next to the read ceiling."""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numba
import numpy as np

from quant import LADDER, aligned, int4_g32, kernels, trellis, trellis_moe
from quant.bandwidth import read_seconds
from quant.rotation import rotate, signs
from quant.scales import to_bits

HIDDEN, INTERMEDIATE, ACTIVE = 7168, 2048, 8  # Kimi K2.5: one expert is gate and up [2048, 7168] and down [7168, 2048]
WEIGHTS = 3 * HIDDEN * INTERMEDIATE
FORMATS = ("int4_g32", *reversed(LADDER))
Step = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # x, ids, weights -> y


class Layer(NamedTuple):
    """Experts of one format, repeated random bytes on pages of their own."""

    format: str
    count: int
    expert_bytes: int
    memory: np.ndarray  # uint8, flat: some of what a step reads
    step: Step
    first: tuple[np.ndarray, np.ndarray]  # the meaning of the first expert's gate_up and down, fp32
    signs: tuple[np.ndarray, np.ndarray]  # of the rotations of their inputs; ones where there is none

    @property
    def bits(self) -> float:
        return 8 * self.expert_bytes / WEIGHTS


def random_layer(name: str, gigabytes: float, rng: np.random.Generator) -> Layer:
    """At least `gigabytes` of distinct experts at K2.5's shape."""
    return _int4_layer(gigabytes, rng) if name == "int4_g32" else _trellis_layer(name, gigabytes, rng)


def _enough(gigabytes: float, expert_bytes: int) -> int:
    return max(2 * ACTIVE, -(-int(gigabytes * 1e9) // expert_bytes))


def _int4_layer(gigabytes: float, rng: np.random.Generator) -> Layer:
    expert_bytes = WEIGHTS * 9 // 16
    count = _enough(gigabytes, expert_bytes)
    experts = kernels.Experts(
        int4_g32.empty(count, 2 * INTERMEDIATE, HIDDEN), int4_g32.empty(count, HIDDEN, INTERMEDIATE)
    )
    for stack in experts:
        first = stack.blocks[0]
        first[:] = rng.integers(0, 256, first.shape, np.uint8)
        scales = rng.random((*first.shape[:-1], 32)).astype(np.float32) * np.float32(0.02) + np.float32(0.01)
        first[..., 512:] = to_bits(scales).view(np.uint8)
        stack.blocks[1:] = first
    gate_up = int4_g32.decode(experts.gate_up.blocks[0], HIDDEN)
    down = int4_g32.decode(experts.down.blocks[0], INTERMEDIATE)
    step, memory = partial(kernels.moe, experts), experts.gate_up.blocks.reshape(-1)
    return Layer(
        "int4_g32", count, expert_bytes, memory, step, (gate_up, down), (np.ones(HIDDEN), np.ones(INTERMEDIATE))
    )


def _trellis_layer(name: str, gigabytes: float, rng: np.random.Generator) -> Layer:
    shapes = (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    blobs = [_random_matrix(name, *shape, rng) for shape in shapes]
    expert_bytes = sum(len(blob) for blob in blobs)
    count = _enough(gigabytes, expert_bytes)
    data = aligned.empty((count, expert_bytes))
    data[:] = np.concatenate(blobs)
    turns = signs(0, 1, "gate_up", HIDDEN), signs(0, 1, "down", INTERMEDIATE)
    offsets = expert_bytes * np.arange(count)
    experts = trellis_moe.experts(data.reshape(-1), offsets, [(name, name)] * count, turns)
    gate_up, down = (trellis.decode(name, blob, *shape) for blob, shape in zip(blobs, shapes, strict=True))
    return Layer(name, count, expert_bytes, data.reshape(-1), partial(trellis_moe.moe, experts), (gate_up, down), turns)


def _random_matrix(name: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    blob = rng.integers(0, 256, trellis.matrix_bytes(name, rows, columns), np.uint8)
    for plane in trellis.planes(name, blob, trellis.layout(rows, columns)):
        plane.scales[:] = to_bits(rng.uniform(5e-4, 1e-3, plane.scales.shape).astype(np.float32))
    return blob


def relative_error(layer: Layer, rng: np.random.Generator) -> float:
    """Of one token through one expert: int8 activations against the same decoded weights in fp32."""
    x = rng.standard_normal((1, HIDDEN)).astype(np.float32)
    found = layer.step(x, np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32))
    turned = x if layer.format == "int4_g32" else rotate(x, layer.signs[0])
    products = (turned @ layer.first[0].T).reshape(-1, 2, 16)
    gate, up = products[:, 0].reshape(1, -1), products[:, 1].reshape(1, -1)
    inner = gate / (1 + np.exp(-gate)) * up
    exact = (inner if layer.format == "int4_g32" else rotate(inner, layer.signs[1])) @ layer.first[1].T
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


class Pass:
    """One sweep over every expert in random order, eight at a time, as a decode step of `batch` tokens does."""

    def __init__(self, layer: Layer, batch: int, rng: np.random.Generator) -> None:
        self.step = layer.step
        self.rng = rng
        self.x = rng.standard_normal((batch, HIDDEN)).astype(np.float32)
        self.weights = np.full((batch, ACTIVE), 1 / ACTIVE, np.float32)
        self.launches = layer.count // ACTIVE
        self.bytes = self.launches * ACTIVE * layer.expert_bytes

    def seconds(self, threads: int) -> float:
        numba.set_num_threads(threads)
        order = self.rng.permutation(self.launches * ACTIVE).reshape(self.launches, ACTIVE)
        start = perf_counter()
        for ids in order:
            self.step(self.x, np.tile(ids, (len(self.x), 1)), self.weights)
        return perf_counter() - start


def ceilings(memory: np.ndarray, threads: list[int], passes: int) -> dict[int, float]:
    """Median read bandwidth over the experts' own memory, GB/s, by number of threads."""
    return {n: median(memory.size / read_seconds(memory, n) / 1e9 for _ in range(passes)) for n in threads}


def measure(
    formats: list[str],
    gigabytes: float,
    threads: list[int],
    batches: list[int],
    passes: int,
    report: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Yield first {"ceiling_gbps": ..}, then one row per format, batch and threads.

    Every timed pass is preceded by a pass of plain reading with as many threads; `share` is the median of the ratios
    of such neighbours, so that a machine that slows down slows both.
    """
    rng = np.random.default_rng(0)
    for index, name in enumerate(formats):
        report(f"preparing {gigabytes:g} GB of {name}")
        layer = random_layer(name, gigabytes, rng)
        if index == 0:
            found = ceilings(layer.memory, threads, passes)
            yield {"ceiling_gbps": {str(n): round(gbps, 2) for n, gbps in found.items()}}
        error = relative_error(layer, rng)
        for batch in batches:
            for n in threads:
                report(f"{name}, {n} threads, batch {batch}")
                yield _row(layer, n, batch, passes, error, rng)
        del layer  # before the next one takes as much memory


def _row(layer: Layer, threads: int, batch: int, passes: int, error: float, rng: np.random.Generator) -> dict[str, Any]:
    sweep, memory = Pass(layer, batch, rng), layer.memory
    sweep.seconds(threads)
    pairs = [(memory.size / read_seconds(memory, threads), sweep.bytes / sweep.seconds(threads)) for _ in range(passes)]
    speed = median(kernel for _, kernel in pairs)
    return {
        "format": layer.format,
        "bpw": round(layer.bits, 4),
        "rows": INTERMEDIATE,
        "cols": HIDDEN,
        "threads": threads,
        "batch": batch,
        "gbps": round(speed / 1e9, 2),
        "gweights_s": round(speed / 1e9 * 8 / layer.bits * batch, 2),
        "share": round(median(kernel / ceiling for ceiling, kernel in pairs), 3),
        "rel_err": round(error, 5),
    }
