"""Our expert kernels beside llama.cpp's, in one run: `python tools/bench_peers.py [--types q4_K,q4_0]`.

Both compute the routed experts of one layer at decode: gate, up, SwiGLU, down and the weighted sum, eight experts a
step, in random order over at least 4 GB of distinct experts, from Python with an array in and an array out. Passes of
plain reading, of ours and of theirs alternate; a share of the ceiling and a ratio are medians over neighbouring passes,
so that a machine that slows down slows all three. llama.cpp runs each type twice where it can: as stored, and repacked
for the CPU, which is its default. Its memory gets the huge pages ours has. With --batch N, N tokens choose the same
eight experts: GB/s count an expert's bytes once, weights per second count each token's products.

Before any timing each side is compared with its own dequantised weights in fp32. The last line is one JSON object.
"""

import argparse
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil
from numba import config, set_num_threads
from peers_ggml import PATTERN, VERSIONS, Ggml, GgmlExperts, Layout, Projections, Shape, version_rows

from hybrid.errors import DoesNotFit, KimiError, UsageError
from quant import int4_g32
from quant.bandwidth import PIECE, read_seconds
from quant.cpu import CPU_NAME, ISA
from quant.kernels import Experts, interleave, moe

TOP_K = 8
TOLERANCE = 0.05
READ_BYTES = 1 << 30  # of our experts, in a pass that measures the ceiling
Step = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # x, ids, weights -> y


class Program(NamedTuple):
    """Something that computes the layer, and what it stores to do so."""

    name: str
    format: str
    experts: int
    bytes_per_expert: int
    rows: Projections  # the meaning of its PATTERN rows
    step: Step
    set_threads: Callable[[int], None]

    def bits(self, shape: Shape) -> float:
        return 8 * self.bytes_per_expert / shape.weights


# --- weights -------------------------------------------------------------------------------------------------------


def random_rows(shape: Shape, rng: np.random.Generator) -> Projections:
    """PATTERN Gaussian rows for each matrix, fp32, scaled like a trained model's."""
    widths = shape.hidden, shape.hidden, shape.intermediate
    return Projections(*(rng.standard_normal((PATTERN, width), np.float32) * np.float32(0.02) for width in widths))


def quantize_int4(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """fp32 [rows, columns] -> the released format (packed uint8, scales as bf16 bits) and its meaning in fp32."""
    rows, columns = matrix.shape
    groups = matrix.reshape(rows, columns // 32, 32)
    bits = ((np.abs(groups).max(axis=2) / 7).view(np.uint32) >> 16).astype(np.uint16)
    scales = (bits.astype(np.uint32) << 16).view(np.float32)[:, :, None]
    codes = np.clip(np.rint(groups / scales), -8, 7)
    stored = (codes + 8).astype(np.uint8).reshape(rows, columns)
    return stored[:, 0::2] | stored[:, 1::2] << 4, bits, (codes * scales).reshape(rows, columns)


def our_experts(rows: Projections, shape: Shape, count: int) -> tuple[Experts, Projections]:
    """`count` experts in our layout, each in memory of its own, and the meaning of the PATTERN rows."""
    experts = Experts(
        int4_g32.empty(count, 2 * shape.intermediate, shape.hidden),
        int4_g32.empty(count, shape.hidden, shape.intermediate),
    )
    packed, scales, decoded = (Projections(*part) for part in zip(*map(quantize_int4, rows), strict=True))
    for expert in range(min(VERSIONS, count)):
        inner, outer = version_rows(expert, shape.intermediate), version_rows(expert, shape.hidden)
        both = [interleave(part.gate[inner], part.up[inner]) for part in (packed, scales)]
        int4_g32.pack(both[0], both[1], experts.gate_up.blocks[expert])
        int4_g32.pack(packed.down[outer], scales.down[outer], experts.down.blocks[expert])
    for expert in range(VERSIONS, count):
        experts.gate_up.blocks[expert] = experts.gate_up.blocks[expert % VERSIONS]
        experts.down.blocks[expert] = experts.down.blocks[expert % VERSIONS]
    return experts, decoded


# --- correctness ---------------------------------------------------------------------------------------------------


def expected(rows: Projections, shape: Shape, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The layer in fp32 NumPy, from the meaning of the PATTERN rows."""
    y = np.zeros_like(x)
    for token, chosen in enumerate(ids):
        gate, up = rows.gate @ x[token], rows.up @ x[token]
        inner = gate / (1 + np.exp(-gate)) * up
        for expert, weight in zip(chosen % VERSIONS, weights[token], strict=True):
            of_expert = inner[version_rows(expert, shape.intermediate)]
            y[token] += weight * (rows.down @ of_expert)[version_rows(expert, shape.hidden)]
    return y


def relative_error(program: Program, shape: Shape, tokens: int, rng: np.random.Generator) -> float:
    """|y - expected| / |expected| for tokens that choose experts each for itself."""
    x = rng.standard_normal((tokens, shape.hidden), np.float32)
    ids = np.stack([rng.choice(program.experts, TOP_K, replace=False) for _ in x]).astype(np.int32)
    weights = rng.random(ids.shape, np.float32)
    target = expected(program.rows, shape, x, ids, weights)
    return float(np.linalg.norm(program.step(x, ids, weights) - target) / np.linalg.norm(target))


def check(program: Program, options: argparse.Namespace) -> None:
    """Print the relative error; raise KimiError when it is more than rounded activations explain."""
    rng = np.random.default_rng(options.seed)
    errors = []
    for threads, tokens in itertools.product(options.threads, sorted({1, 3, *options.batch})):
        program.set_threads(threads)
        errors.append(relative_error(program, options.shape, tokens, rng))
    name = f"{program.name} {program.format}"
    print(f"{name}: relative error {max(errors):.2%} against its dequantised weights in fp32", flush=True)
    if not max(errors) < TOLERANCE:
        raise KimiError(f"{name} computes something else.", "Its timings would mean nothing.")


# --- timing --------------------------------------------------------------------------------------------------------


def random_order(count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless steps of TOP_K expert ids: every expert once, in random order, before any comes again."""
    while True:
        order = rng.permutation(count).astype(np.int32)
        yield from order[: count // TOP_K * TOP_K].reshape(-1, TOP_K)


def visits_per_second(visit: Callable[[np.ndarray], object], order: Iterator[np.ndarray], seconds: float) -> float:
    """Experts computed per second in a pass of at least `seconds`; one step before it wakes the threads."""
    visit(next(order))
    visits, start = 0, time.perf_counter()
    while True:
        ids = next(order)
        visit(ids)
        visits += ids.size
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return visits / elapsed


def alternate(passes: Sequence[Callable[[], float]], repetitions: int) -> list[list[float]]:
    """A B C A B C ...: the results of each pass, repetition by repetition."""
    rounds = [[run() for run in passes] for _ in range(repetitions)]
    return [list(results) for results in zip(*rounds, strict=True)]


class Duel(NamedTuple):
    """One setting, ours against one of theirs: passes of each, taken in turn."""

    against: str  # their format
    bpw: float  # of theirs
    threads: int
    batch: int
    ceiling: list[float]  # GB/s
    ours: list[float]  # experts/s
    theirs: list[float]  # experts/s


def duel(ours: Program, theirs: Program, buffer: np.ndarray, options: argparse.Namespace) -> Iterator[Duel]:
    """Every number of threads and batch size asked for; `buffer` is read to find the ceiling."""
    rng = np.random.default_rng(options.seed)
    for batch, threads in itertools.product(options.batch, options.threads):
        x = rng.standard_normal((batch, options.shape.hidden), np.float32)
        weights = rng.random((batch, TOP_K), np.float32)
        passes = [partial(read_gbps, buffer, threads)]
        for program in (ours, theirs):
            program.set_threads(threads)
            visit = partial(visit_all, program.step, x, weights)
            order = random_order(program.experts, rng)
            passes.append(partial(visits_per_second, visit, order, options.seconds))
        yield Duel(theirs.format, theirs.bits(options.shape), threads, batch, *alternate(passes, options.repetitions))


def read_gbps(buffer: np.ndarray, threads: int) -> float:
    return buffer.size / read_seconds(buffer, threads) / 1e9


def visit_all(step: Step, x: np.ndarray, weights: np.ndarray, ids: np.ndarray) -> None:
    """One step in which every token chooses the same experts."""
    step(x, np.tile(ids, (len(x), 1)), weights)


# --- the result ----------------------------------------------------------------------------------------------------


def summary(duels: Sequence[Duel], ours: tuple[str, float], weights: int) -> dict[str, Any]:
    """The JSON object. `ours` is (format, bits per weight), `weights` those of one expert; medians throughout."""
    ceiling = {
        str(threads): rounded(median(gbps for d in duels if d.threads == threads for gbps in d.ceiling))
        for threads in sorted({d.threads for d in duels})
    }
    rows = []
    for batch, threads in sorted({(d.batch, d.threads) for d in duels}):
        here = [d for d in duels if (d.batch, d.threads) == (batch, threads)]
        passes = [pair for d in here for pair in zip(d.ceiling, d.ours, strict=True)]
        entries = [("kimi-local", *ours, passes)]
        entries += [("llama.cpp", d.against, d.bpw, list(zip(d.ceiling, d.theirs, strict=True))) for d in here]
        for program, name, bpw, pairs in entries:
            at = {"program": program, "format": name, "bpw": bpw, "threads": threads, "batch": batch}
            rows.append(at | speed(pairs, bpw, weights, batch))
    ratios = [
        {
            "against": d.against,
            "threads": d.threads,
            "batch": d.batch,
            "gweights_s_ratio": rounded(median(ratios_of(d))),
        }
        for d in duels
    ]
    return {"ceiling_gbps": ceiling, "rows": rows, "ratios": ratios}


def speed(passes: Sequence[tuple[float, float]], bpw: float, weights: int, batch: int) -> dict[str, float]:
    """From (ceiling GB/s, experts/s) of neighbouring passes."""
    gbytes = bpw * weights / 8e9  # of an expert
    visits = median(visits for _, visits in passes)
    return {
        "gbps": rounded(visits * gbytes),
        "gweights_s": rounded(visits * weights * batch / 1e9),
        "share": rounded(median(visits * gbytes / ceiling for ceiling, visits in passes)),
    }


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def ratios_of(d: Duel) -> list[float]:
    """Ours / theirs in weights per second, repetition by repetition."""
    return [ours / theirs for ours, theirs in zip(d.ours, d.theirs, strict=True)]


def print_summary(result: dict[str, Any], duels: Sequence[Duel], weights: int) -> None:
    """The ceiling, the table, the ratios with their spread, and the JSON object as last line."""
    print()
    for threads, gbps in result["ceiling_gbps"].items():
        print(f"ceiling: {gbps:.2f} GB/s read with {threads} thread(s)")
    print(f"\n{'program':12}{'format':18}{'bits':>6}{'threads':>9}{'batch':>7}", end="")
    print(f"{'ms/expert':>11}{'GB/s':>8}{'Gweights/s':>12}{'share':>8}")
    for row in result["rows"]:
        milliseconds = row["bpw"] * weights / 8e6 / row["gbps"]
        print(f"{row['program']:12}{row['format']:18}{row['bpw']:6.3f}{row['threads']:9}{row['batch']:7}", end="")
        print(f"{milliseconds:11.3f}{row['gbps']:8.2f}{row['gweights_s']:12.2f}{row['share']:8.1%}")
    print("\nours / theirs in weights per second, median (and range) of neighbouring passes:")
    for d in duels:
        found = ratios_of(d)
        setting = f"{d.against}, {d.threads} thread(s), batch {d.batch}"
        print(f"  {setting:40} {median(found):.2f}  ({min(found):.2f} to {max(found):.2f})")
    print(json.dumps(result))


# --- the run -------------------------------------------------------------------------------------------------------


def enough(gigabytes: float, bytes_per_expert: float) -> int:
    """How many experts fill that much memory, at least two steps' worth."""
    return max(2 * TOP_K, math.ceil(gigabytes * 1e9 / bytes_per_expert))


def our_program(pattern: Projections, options: argparse.Namespace) -> tuple[Program, np.ndarray]:
    """Our kernels with experts of their own, and part of that memory as one flat array."""
    bytes_per_expert = int(options.shape.weights * int4_g32.BITS_PER_WEIGHT / 8)
    count = enough(options.gb, bytes_per_expert)
    experts, rows = our_experts(pattern, options.shape, count)
    assert experts.gate_up.blocks.nbytes + experts.down.blocks.nbytes == count * bytes_per_expert
    program = Program("kimi-local", "int4_g32", count, bytes_per_expert, rows, partial(moe, experts), set_num_threads)
    memory = experts.gate_up.blocks.reshape(-1)
    return program, memory[: min(READ_BYTES, memory.size // PIECE * PIECE)]


@contextmanager
def their_program(ggml: Ggml, layout: Layout, pattern: Projections, options: argparse.Namespace) -> Iterator[Program]:
    """llama.cpp with as many bytes of experts; freed at the end."""
    pairs = [ggml.quantize(layout.type, matrix) for matrix in pattern]
    raw, rows = (Projections(*parts) for parts in zip(*pairs, strict=True))
    stored = ggml.bytes_per_expert(layout.type, options.shape)
    experts = GgmlExperts(ggml, layout, options.shape, enough(options.gb, stored), TOP_K)
    with closing(experts):
        experts.fill(raw)
        yield Program("llama.cpp", layout.name, experts.count, stored, rows, experts.step, ggml.set_threads)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns the JSON object."""
    ggml = Ggml()
    layouts = [layout for name in options.types for layout in ggml.layouts(name, options.shape, TOP_K)]
    require_memory(options.gb)
    print_machine(ggml, options)
    pattern = random_rows(options.shape, np.random.default_rng(options.seed))
    ours, buffer = our_program(pattern, options)
    check(ours, options)
    duels: list[Duel] = []
    for layout in layouts:
        with their_program(ggml, layout, pattern, options) as theirs:
            check(theirs, options)
            duels.extend(duel(ours, theirs, buffer, options))
    result = summary(duels, (ours.format, ours.bits(options.shape)), options.shape.weights)
    print_summary(result, duels, options.shape.weights)
    return result


def require_memory(gigabytes: float) -> None:
    """Both sides, and a third of theirs once more while it is copied."""
    needed = gigabytes * 7 / 3 + 0.5
    available = psutil.virtual_memory().available / 1e9
    if needed > available:
        raise DoesNotFit(f"This needs {needed:.1f} GB of memory; {available:.1f} GB are free.", "Use a smaller --gb.")


def print_machine(ggml: Ggml, options: argparse.Namespace) -> None:
    print(f"machine: {cpu_model()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}")
    print(f"ours:    Numba {version('numba')}, kernels {ISA}, compiled for {CPU_NAME}")
    print(f"theirs:  llama-cpp-python {version('llama-cpp-python')}, ggml {ggml.version}, {' '.join(ggml.features)}")
    print(f"expert:  gate and up {options.shape.intermediate} x {options.shape.hidden}, down transposed; ", end="")
    print(f"{TOP_K} a step of {options.gb:g} GB; {options.repetitions} x {options.seconds:g} s each", flush=True)


def cpu_model() -> str:
    """The processor's own name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def numbers(text: str) -> list[int]:
    """A comma-separated option."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(text)
    return values


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", type=lambda text: text.split(","), default=["q4_K", "q4_0"], help="of llama.cpp")
    parser.add_argument("--gb", type=float, default=4.0, help="of experts on each side")
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a pass, at least")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.shape = Shape(options.hidden, options.intermediate)
    if max(options.threads) > config.NUMBA_NUM_THREADS:
        raise UsageError(f"This machine has {config.NUMBA_NUM_THREADS} threads.", "Use a smaller --threads.")
    if min(options.repetitions, options.seconds, *options.shape) <= 0 or any(n % 64 for n in options.shape):
        raise UsageError("Counts must be positive, --hidden and --intermediate multiples of 64.")
    if options.gb < 0.01:
        raise UsageError("--gb is at least 0.01.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except KimiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
