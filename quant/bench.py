"""Kernels against the machine: whole experts at full size, out of memory no cache holds, next to the read ceiling."""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numba
import numpy as np

from quant import LADDER, aligned, int4_g32, kernels, trellis, trellis_moe
from quant.bandwidth import PIECE, read_seconds
from quant.gemm import Gemm
from quant.gemm import Layer as Stored
from quant.gemm import sides as sides_of
from quant.rotation import rotate, signs
from quant.scales import to_bits

ACTIVE = 8  # experts a token chooses
FORMATS = ("int4_g32", *reversed(LADDER))
CROWDED = 33  # tokens of an expert from which it may pay to decode it, so that both ways are timed
Step = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # x, ids, weights -> y


class Shape(NamedTuple):
    """Of one expert: gate and up are [intermediate, hidden], down is [hidden, intermediate]; multiples of 64."""

    hidden: int
    intermediate: int

    @property
    def weights(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def gate_up(self) -> tuple[int, int]:
        """Rows and columns of gate and up as one matrix."""
        return 2 * self.intermediate, self.hidden

    @property
    def down(self) -> tuple[int, int]:
        return self.hidden, self.intermediate


K25 = Shape(7168, 2048)  # Kimi K2.5


class Layer(NamedTuple):
    """Experts of one format, repeated random bytes on pages of their own."""

    format: str
    shape: Shape
    experts: int
    expert_bytes: int
    memory: np.ndarray  # uint8, flat: some of what a step reads, in whole mebibytes
    step: Step
    stored: Stored
    first: tuple[np.ndarray, np.ndarray]  # the meaning of every expert's gate_up and down, fp32
    signs: tuple[np.ndarray, np.ndarray]  # of the rotations of their inputs; ones where there is none

    @property
    def bits(self) -> float:
        return 8 * self.expert_bytes / self.shape.weights


def random_layer(name: str, gigabytes: float, rng: np.random.Generator, shape: Shape = K25) -> Layer:
    """At least `gigabytes` of experts and two steps' worth, in format `name`."""
    return _int4_layer(gigabytes, rng, shape) if name == "int4_g32" else _trellis_layer(name, gigabytes, rng, shape)


def enough(gigabytes: float, expert_bytes: int) -> int:
    """How many experts fill that much memory, at least two steps' worth."""
    return max(2 * ACTIVE, -(-int(gigabytes * 1e9) // expert_bytes))


def _whole(memory: np.ndarray) -> np.ndarray:
    """What `read_seconds` reads of it, flat."""
    return memory.reshape(-1)[: memory.size // PIECE * PIECE]


def _int4_layer(gigabytes: float, rng: np.random.Generator, shape: Shape) -> Layer:
    expert_bytes = shape.weights * 9 // 16
    count = enough(gigabytes, expert_bytes)
    experts = kernels.Experts(int4_g32.empty(count, *shape.gate_up), int4_g32.empty(count, *shape.down))
    for stack in experts:
        first = stack.blocks[0]
        first[:] = rng.integers(0, 256, first.shape, np.uint8)
        scales = rng.random((*first.shape[:-1], 32)).astype(np.float32) * np.float32(0.02) + np.float32(0.01)
        first[..., 512:] = to_bits(scales).view(np.uint8)
        stack.blocks[1:] = first
    meanings = (
        int4_g32.decode(experts.gate_up.blocks[0], shape.hidden),
        int4_g32.decode(experts.down.blocks[0], shape.intermediate),
    )
    memory, ones = _whole(experts.gate_up.blocks), (np.ones(shape.hidden), np.ones(shape.intermediate))
    return Layer("int4_g32", shape, count, expert_bytes, memory, partial(kernels.moe, experts), experts, meanings, ones)


def _trellis_layer(name: str, gigabytes: float, rng: np.random.Generator, shape: Shape) -> Layer:
    sides = shape.gate_up, shape.down
    blobs = [random_matrix(name, *side, rng) for side in sides]
    expert_bytes = sum(len(blob) for blob in blobs)
    count = enough(gigabytes, expert_bytes)
    data = aligned.empty((count, expert_bytes))
    data[:] = np.concatenate(blobs)
    turns = signs(0, 1, "gate_up", shape.hidden), signs(0, 1, "down", shape.intermediate)
    offsets = expert_bytes * np.arange(count)
    experts = trellis_moe.experts(data.reshape(-1), offsets, [(name, name)] * count, turns)
    gate_up, down = (trellis.decode(name, blob, *side) for blob, side in zip(blobs, sides, strict=True))
    step = partial(trellis_moe.moe, experts)
    return Layer(name, shape, count, expert_bytes, _whole(data), step, experts, (gate_up, down), turns)


def random_matrix(name: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    blob = rng.integers(0, 256, trellis.matrix_bytes(name, rows, columns), np.uint8)
    for plane in trellis.planes(name, blob, trellis.layout(rows, columns)):
        plane.scales[:] = to_bits(rng.uniform(5e-4, 1e-3, plane.scales.shape).astype(np.float32))
    return blob


def exact(layer: Layer, x: np.ndarray) -> np.ndarray:
    """What every expert of the layer computes, in fp32 NumPy: x [tokens, hidden] -> [tokens, hidden]."""
    products = (_turned(layer, x, 0) @ layer.first[0].T).reshape(len(x), -1, 2, 16)
    gate, up = (products[:, :, part].reshape(len(x), -1) for part in (0, 1))
    return _turned(layer, gate / (1 + np.exp(-gate)) * up, 1) @ layer.first[1].T


def _turned(layer: Layer, x: np.ndarray, matrix: int) -> np.ndarray:
    """The input of gate_up (0) or down (1) in the basis of its weights."""
    return x if layer.format == "int4_g32" else rotate(x, layer.signs[matrix])


def relative_error(layer: Layer, rng: np.random.Generator, tokens: int = 1) -> float:
    """Of tokens that choose experts each for itself: int8 activations against the same decoded weights in fp32."""
    x = rng.standard_normal((tokens, layer.shape.hidden)).astype(np.float32)
    ids = np.stack([rng.choice(layer.experts, ACTIVE, replace=False) for _ in x])
    weights = rng.random(ids.shape, np.float32)
    expected = weights.sum(axis=1, keepdims=True) * exact(layer, x)
    return float(np.linalg.norm(layer.step(x, ids, weights) - expected) / np.linalg.norm(expected))


# -- the other way: decoded, and multiplied by a library --------------------------------------------------------------
def decoded(layer: Layer, gemm: Gemm) -> Layer:
    """The layer with all its experts multiplied by `gemm` instead of the kernels."""

    def step(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        y = np.zeros_like(x)
        gemm.add_all(layer.stored, np.unique(ids).tolist(), x, ids, weights, y)
        return y

    return layer._replace(step=step)


def product_gflops(layer: Layer, gemm: Gemm, batch: int, passes: int = 3) -> float:
    """Its ceiling: the products of one expert for `batch` tokens by the library alone, in pieces decoded before."""
    seconds, operations = 0.0, 0
    for side in sides_of(layer.stored, 0):
        w = gemm.decode(layer.stored, side, 0)
        x, out = np.zeros((batch, len(w)), gemm.dtype), np.zeros((batch, w.shape[1]), gemm.dtype)
        gemm.product(x, w, out)
        seconds += min(_timed(partial(gemm.product, x, w, out)) for _ in range(passes))
        operations += 2 * batch * w.size
    return operations / seconds / 1e9


def _timed(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


class Pass:
    """One sweep over every expert in random order, eight at a time, as a decode step of `batch` tokens does."""

    def __init__(self, layer: Layer, batch: int, rng: np.random.Generator) -> None:
        self.step = layer.step
        self.rng = rng
        self.x = rng.standard_normal((batch, layer.shape.hidden)).astype(np.float32)
        self.weights = np.full((batch, ACTIVE), 1 / ACTIVE, np.float32)
        self.launches = layer.experts // ACTIVE
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
    shape: Shape = K25,
    make_gemm: Callable[[int], Gemm] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield first {"ceiling_gbps": ..}, then one row per format, batch and threads.

    `make_gemm` of a number of threads gives the other path, timed where a batch is CROWDED; then the head has
    "ceiling_gflops" by threads and batch too, and a second row follows the first.

    Every timed pass is preceded by a pass of plain reading with as many threads; `share` is the median of the ratios
    of such neighbours, so that a machine that slows down slows both.
    """
    rng = np.random.default_rng(0)
    for index, name in enumerate(formats):
        report(f"preparing {gigabytes:g} GB of {name}")
        layer = random_layer(name, gigabytes, rng, shape)
        if index == 0:
            found = ceilings(layer.memory, threads, passes)
            head: dict[str, Any] = {"ceiling_gbps": {str(n): round(gbps, 2) for n, gbps in found.items()}}
            crowded = [batch for batch in batches if batch >= CROWDED and make_gemm is not None]
            if make_gemm is not None and crowded:
                head["ceiling_gflops"] = {
                    str(n): {str(b): round(product_gflops(layer, make_gemm(n), b), 1) for b in crowded} for n in threads
                }
            yield head
        error = relative_error(layer, rng)
        for batch in batches:
            for n in threads:
                report(f"{name}, {n} threads, batch {batch}")
                yield {"path": "kernel"} | _row(layer, n, batch, passes, error, rng)
                if make_gemm is not None and batch in crowded:
                    other = decoded(layer, make_gemm(n))
                    yield {"path": "gemm"} | _row(other, n, batch, passes, relative_error(other, rng), rng)
        del layer  # before the next one takes as much memory


def _row(layer: Layer, threads: int, batch: int, passes: int, error: float, rng: np.random.Generator) -> dict[str, Any]:
    sweep, memory = Pass(layer, batch, rng), layer.memory
    sweep.seconds(threads)
    pairs = [(memory.size / read_seconds(memory, threads), sweep.bytes / sweep.seconds(threads)) for _ in range(passes)]
    speed = median(kernel for _, kernel in pairs)
    return {
        "format": layer.format,
        "bpw": round(layer.bits, 4),
        "rows": layer.shape.intermediate,
        "cols": layer.shape.hidden,
        "threads": threads,
        "batch": batch,
        "gbps": round(speed / 1e9, 2),
        "gweights_s": round(speed / 1e9 * 8 / layer.bits * batch, 2),
        "share": round(median(kernel / ceiling for ceiling, kernel in pairs), 3),
        "rel_err": round(error, 5),
    }
