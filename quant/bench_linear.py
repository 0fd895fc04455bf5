"""Resident matrices against the machine: K2.5's shapes in bf16, int8 and INT4, out of memory no cache holds."""

from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import numba
import numpy as np

from quant import aligned, bf16, linear
from quant.bandwidth import read_seconds
from quant.bench import ceilings
from quant.linear import Matrix
from quant.scales import to_bits

# name: rows, columns. The head's rows are an eighth of the real ones; more would only take longer.
SHAPES = {
    "q_b_proj": (12288, 1536),
    "o_proj": (7168, 8192),
    "shared_experts.gate_proj": (2048, 7168),
    "lm_head": (20480, 7168),
}
BITS_PER_WEIGHT = {"bf16": 16.0, "int8_g32": 8.5, "int4_g32": 4.5}
ENCODED_ROWS = 512  # encoded for real; the rest of a matrix repeats them on pages of its own


class Pool(Protocol):
    """Distinct matrices of one shape and format in one stretch of memory."""

    memory: np.ndarray  # uint8, all of it
    count: int

    def multiply(self, index: int, x: np.ndarray) -> np.ndarray: ...


class PackedPool:
    """Matrices of a format of `quant.linear`."""

    def __init__(self, name: str, weights: np.ndarray, rows: int, count: int) -> None:
        self.name, self.rows, self.columns, self.count = name, rows, weights.shape[1], count
        part = linear.encode(name, weights).blocks
        self.blocks = aligned.empty((count, rows // linear.ROWS, *part.shape[1:]))
        self.blocks.reshape(-1, *part.shape)[:] = part
        self.memory = self.blocks.reshape(-1)

    def multiply(self, index: int, x: np.ndarray) -> np.ndarray:
        return linear.multiply(Matrix(self.name, self.blocks[index], self.rows, self.columns), x)


class PlainPool:
    """bf16 matrices."""

    def __init__(self, weights: np.ndarray, rows: int, count: int) -> None:
        self.count = count
        self.memory = aligned.empty((2 * count * rows * weights.shape[1],))
        self.bits = self.memory.view(np.int16).reshape(count, rows, weights.shape[1])
        self.bits.reshape(-1, *weights.shape)[:] = to_bits(weights).view(np.int16)

    def multiply(self, index: int, x: np.ndarray) -> np.ndarray:
        return bf16.multiply(self.bits[index], x)


def make_pool(name: str, weights: np.ndarray, rows: int, bytes_: float) -> Pool:
    """At least two matrices and `bytes_` bytes; `rows` a multiple of those of `weights` fp32 [rows, columns]."""
    count = max(2, -(-int(bytes_ * 8) // int(rows * weights.shape[1] * BITS_PER_WEIGHT[name])))
    return PlainPool(weights, rows, count) if name == "bf16" else PackedPool(name, weights, rows, count)


def relative_error(pool: Pool, weights: np.ndarray, rng: np.random.Generator) -> float:
    """Of a product with one token: format and int8 activations against the fp32 weights that were encoded."""
    x = rng.standard_normal((1, weights.shape[1])).astype(np.float32)
    exact = x @ weights.T
    return float(np.linalg.norm(pool.multiply(0, x)[:, : len(weights)] - exact) / np.linalg.norm(exact))


def sweep_seconds(pool: Pool, x: np.ndarray, threads: int) -> float:
    """Time to multiply every matrix of the pool once."""
    numba.set_num_threads(threads)
    start = perf_counter()
    for index in range(pool.count):
        pool.multiply(index, x)
    return perf_counter() - start


def measure_linear(
    megabytes: float,
    threads: list[int],
    batches: list[int],
    passes: int,
    report: Callable[[str], None],
    shapes: dict[str, tuple[int, int]] = SHAPES,
) -> Iterator[dict[str, Any]]:
    """Yield {"ceiling_gbps": ..}, then a row per shape, format, batch and number of threads, over `megabytes` of each.

    Every timed pass is preceded by plain reading of the same memory with as many threads; `share` is the median of the
    ratios of such neighbours, and gbps counts the bytes of the weights once per batch.
    """
    rng, first = np.random.default_rng(0), True
    for shape, (rows, columns) in shapes.items():
        weights = rng.standard_normal((min(rows, ENCODED_ROWS), columns)).astype(np.float32)
        for name in BITS_PER_WEIGHT:
            report(f"{shape} in {name}")
            pool = make_pool(name, weights, rows, megabytes * 1e6)
            if first:
                yield {"ceiling_gbps": {str(n): round(v, 2) for n, v in ceilings(pool.memory, threads, passes).items()}}
                first = False
            facts = {"shape": shape, "format": name, "bpw": BITS_PER_WEIGHT[name], "rows": rows, "cols": columns}
            error = relative_error(pool, weights, rng)
            for batch in batches:
                x = rng.standard_normal((batch, columns)).astype(np.float32)
                for n in threads:
                    found = _measured(pool, x, n, passes)
                    products = found["gbps"] * 8 / BITS_PER_WEIGHT[name] * batch
                    yield {**facts, **found, "gweights_s": round(products, 2), "rel_err": round(error, 5)}


def _measured(pool: Pool, x: np.ndarray, threads: int, passes: int) -> dict[str, Any]:
    size = pool.memory.size
    sweep_seconds(pool, x, threads)
    pairs = [(size / read_seconds(pool.memory, threads), size / sweep_seconds(pool, x, threads)) for _ in range(passes)]
    speed = median(kernel for _, kernel in pairs)
    return {
        "threads": threads,
        "batch": len(x),
        "gbps": round(speed / 1e9, 2),
        "share": round(median(kernel / ceiling for ceiling, kernel in pairs), 3),
    }
