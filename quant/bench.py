"""Kernels against the machine: whole experts at full size, out of memory no cache holds, next to the read ceiling."""

from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter
from typing import Any

import numba
import numpy as np

from quant import int4_g32, kernels
from quant.bandwidth import read_seconds

HIDDEN, INTERMEDIATE, ACTIVE = 7168, 2048, 8  # Kimi K2.5: one expert is gate and up [2048, 7168] and down [7168, 2048]
WEIGHTS = 3 * HIDDEN * INTERMEDIATE


def random_experts(gigabytes: float, rng: np.random.Generator) -> kernels.Experts:
    """At least `gigabytes` of distinct INT4 experts at K2.5's shape; repeated random bytes on pages of their own."""
    count = max(2 * ACTIVE, -(-int(gigabytes * 1e9) // (WEIGHTS * 9 // 16)))
    experts = kernels.Experts(
        int4_g32.empty(count, 2 * INTERMEDIATE, HIDDEN), int4_g32.empty(count, HIDDEN, INTERMEDIATE)
    )
    for stack in experts:
        first = stack.blocks[0]
        first[:] = rng.integers(0, 256, first.shape, np.uint8)
        scales = (rng.random((*first.shape[:-1], 32)).astype(np.float32) * 0.02 + 0.01).view(np.uint32) >> 16
        first[..., 512:] = scales.astype(np.uint16).view(np.uint8)
        stack.blocks[1:] = first
    return experts


def relative_error(experts: kernels.Experts, rng: np.random.Generator) -> float:
    """Of one token through one expert: int8 activations against the same decoded weights in fp32."""
    x = rng.standard_normal((1, HIDDEN)).astype(np.float32)
    found = kernels.moe(experts, x, np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32))
    gate_up = int4_g32.decode(experts.gate_up.blocks[0], HIDDEN).reshape(-1, 2, 16, HIDDEN)
    gate, up = (x @ gate_up[:, part].reshape(-1, HIDDEN).T for part in (0, 1))
    exact = (gate / (1 + np.exp(-gate)) * up) @ int4_g32.decode(experts.down.blocks[0], INTERMEDIATE).T
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


class Pass:
    """One sweep over every expert in random order, eight at a time, as a decode step of `batch` tokens does."""

    def __init__(self, experts: kernels.Experts, batch: int, rng: np.random.Generator) -> None:
        self.experts = experts
        self.rng = rng
        self.x = rng.standard_normal((batch, HIDDEN)).astype(np.float32)
        self.weights = np.full((batch, ACTIVE), 1 / ACTIVE, np.float32)
        self.launches = experts.gate_up.blocks.shape[0] // ACTIVE
        self.bytes = self.launches * ACTIVE * sum(stack.blocks[0].nbytes for stack in experts)

    def seconds(self, threads: int) -> float:
        numba.set_num_threads(threads)
        order = self.rng.permutation(self.launches * ACTIVE).reshape(self.launches, ACTIVE)
        start = perf_counter()
        for ids in order:
            kernels.moe(self.experts, self.x, np.tile(ids, (len(self.x), 1)), self.weights)
        return perf_counter() - start


def ceilings(experts: kernels.Experts, threads: list[int], passes: int) -> dict[int, float]:
    """Median read bandwidth over the experts' own memory, GB/s, by number of threads."""
    buffer = experts.gate_up.blocks.reshape(-1)
    return {n: median(buffer.size / read_seconds(buffer, n) / 1e9 for _ in range(passes)) for n in threads}


def measure(
    gigabytes: float,
    threads: list[int],
    batches: list[int],
    passes: int,
    report: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Yield first {"ceiling_gbps": ..}, then one row per threads and batch.

    Every timed pass is preceded by a pass of plain reading with as many threads; `share` is the median of the ratios
    of such neighbours, so that a machine that slows down slows both.
    """
    rng = np.random.default_rng(0)
    report(f"preparing {gigabytes:g} GB of experts")
    experts = random_experts(gigabytes, rng)
    error = relative_error(experts, rng)
    buffer = experts.gate_up.blocks.reshape(-1)
    yield {"ceiling_gbps": {str(n): round(gbps, 2) for n, gbps in ceilings(experts, threads, passes).items()}}
    for batch in batches:
        sweep = Pass(experts, batch, rng)
        for n in threads:
            sweep.seconds(n)
            report(f"{n} threads, batch {batch}")
            pairs = [(buffer.size / read_seconds(buffer, n), sweep.bytes / sweep.seconds(n)) for _ in range(passes)]
            speed = median(kernel for _, kernel in pairs)
            yield {
                "format": "int4_g32",
                "bpw": int4_g32.BITS_PER_WEIGHT,
                "rows": INTERMEDIATE,
                "cols": HIDDEN,
                "threads": n,
                "batch": batch,
                "gbps": round(speed / 1e9, 2),
                "gweights_s": round(speed / 1e9 * 8 / int4_g32.BITS_PER_WEIGHT * batch, 2),
                "share": round(median(kernel / ceiling for ceiling, kernel in pairs), 3),
                "rel_err": round(error, 5),
            }
