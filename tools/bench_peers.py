"""Our expert kernels beside llama.cpp's, in one run: `python tools/bench_peers.py [--pairs trellis2:iq2_xxs]`.

A pair is a format of ours and a type of llama.cpp's. Both compute the routed experts of one layer at decode: gate, up,
SwiGLU, down and the weighted sum, eight experts a step, in random order over at least 4 GB of experts each in memory of
its own, from Python with an array in and an array out. Passes of plain reading, of ours and of theirs alternate; a
share of the ceiling and a ratio are medians over neighbouring passes, so that a machine that slows down slows all
three. llama.cpp runs each type twice where it can: as stored, and repacked for the CPU, which is its default. Its
memory gets the huge pages ours has. With --batch N, N tokens choose the same eight experts: GB/s count an expert's
bytes once, weights per second count each token's products. Batches above 32 are computed a second time by our other
path, "gemm": decoded, and multiplied by torch, whose GFLOP/s at these shapes are printed first.

Before any timing each side is compared with its own dequantised weights in fp32. The last line is one JSON object.

--isa avx2 compiles our kernels for processors without AVX-512. llama.cpp's libraries stay as they were built, usually
for this machine with all it has.
"""

import argparse
import itertools
import json
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
from peers_ggml import PATTERN, VERSIONS, Ggml, GgmlExperts, Layout, Projections, version_rows
from peers_torch import crowded, torch_ceiling

from cli.bench import FORCED, force
from hybrid.errors import DoesNotFit, KimiError, UsageError
from hybrid.memory.many import torch_gemm
from quant.bandwidth import read_seconds
from quant.bench import ACTIVE, FORMATS, Layer, Shape, Step, decoded, enough, random_layer, relative_error
from quant.cpu import CPU_NAME, ISA

PAIRS = "trellis2:iq2_xxs,trellis1_5:iq1_s,trellis1:iq1_s,int4_g32:q4_K"
TOLERANCE = 0.05
READ_BYTES = 1 << 30  # of our experts, in a pass that measures the ceiling


class Program(NamedTuple):
    """Something that computes the layer."""

    name: str
    format: str
    bits: float  # per weight, of what it stores
    experts: int
    step: Step
    error: Callable[[np.random.Generator, int], float]  # of so many tokens, against its own weights in fp32
    set_threads: Callable[[int], None]


# --- correctness ---------------------------------------------------------------------------------------------------


def random_rows(shape: Shape, rng: np.random.Generator) -> Projections:
    """PATTERN Gaussian rows for each matrix of theirs, fp32, scaled like a trained model's."""
    widths = shape.hidden, shape.hidden, shape.intermediate
    return Projections(*(rng.standard_normal((PATTERN, width), np.float32) * np.float32(0.02) for width in widths))


def expected(rows: Projections, shape: Shape, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Their layer in fp32 NumPy, from the meaning of the PATTERN rows."""
    y = np.zeros_like(x)
    for token, chosen in enumerate(ids):
        gate, up = rows.gate @ x[token], rows.up @ x[token]
        inner = gate / (1 + np.exp(-gate)) * up
        for expert, weight in zip(chosen % VERSIONS, weights[token], strict=True):
            of_expert = inner[version_rows(expert, shape.intermediate)]
            y[token] += weight * (rows.down @ of_expert)[version_rows(expert, shape.hidden)]
    return y


def their_error(experts: GgmlExperts, rows: Projections, rng: np.random.Generator, tokens: int) -> float:
    """|y - expected| / |expected| for tokens that choose experts each for itself."""
    x = rng.standard_normal((tokens, experts.shape.hidden), np.float32)
    ids = np.stack([rng.choice(experts.count, ACTIVE, replace=False) for _ in x])
    weights = rng.random(ids.shape, np.float32)
    target = expected(rows, experts.shape, x, ids, weights)
    return float(np.linalg.norm(experts.step(x, ids, weights) - target) / np.linalg.norm(target))


def check(program: Program, options: argparse.Namespace, batches: Sequence[int] | None = None) -> None:
    """Print the relative error; raise KimiError when it is more than rounded activations explain."""
    rng = np.random.default_rng(options.seed)
    errors = []
    for threads, tokens in itertools.product(options.threads, batches or sorted({1, 3, *options.batch})):
        program.set_threads(threads)
        errors.append(program.error(rng, tokens))
    name = f"{program.name} {program.format}"
    print(f"{name}: relative error {max(errors):.2%} against its dequantised weights in fp32", flush=True)
    if not max(errors) < TOLERANCE:
        raise KimiError(f"{name} computes something else.", "Its timings would mean nothing.")


# --- timing --------------------------------------------------------------------------------------------------------


def random_order(count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless steps of ACTIVE expert ids: every expert once, in random order, before any comes again."""
    while True:
        order = rng.permutation(count)
        yield from order[: count // ACTIVE * ACTIVE].reshape(-1, ACTIVE)


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


class Side(NamedTuple):
    """One program in a duel."""

    format: str
    bpw: float
    visits: list[float]  # experts/s, pass by pass


class Duel(NamedTuple):
    """One setting, ours against one of theirs: passes of each, taken in turn."""

    threads: int
    batch: int
    ceiling: list[float]  # GB/s
    ours: Side
    theirs: Side


def duel(
    ours: Program, theirs: Program, buffer: np.ndarray, options: argparse.Namespace, batches: Sequence[int]
) -> Iterator[Duel]:
    """Every number of threads asked for, and these batch sizes; `buffer` is read to find the ceiling."""
    rng = np.random.default_rng(options.seed)
    for batch, threads in itertools.product(batches, options.threads):
        x = rng.standard_normal((batch, options.shape.hidden), np.float32)
        weights = rng.random((batch, ACTIVE), np.float32)
        passes = [partial(read_gbps, buffer, threads)]
        for program in (ours, theirs):
            program.set_threads(threads)
            visit = partial(visit_all, program.step, x, weights)
            order = random_order(program.experts, rng)
            passes.append(partial(visits_per_second, visit, order, options.seconds))
        ceiling, *visits = alternate(passes, options.repetitions)
        sides = (Side(p.format, round(p.bits, 4), each) for p, each in zip((ours, theirs), visits, strict=True))
        yield Duel(threads, batch, ceiling, *sides)


def read_gbps(buffer: np.ndarray, threads: int) -> float:
    return buffer.size / read_seconds(buffer, threads) / 1e9


def visit_all(step: Step, x: np.ndarray, weights: np.ndarray, ids: np.ndarray) -> None:
    """One step in which every token chooses the same experts."""
    step(x, np.tile(ids, (len(x), 1)), weights)


# --- the result ----------------------------------------------------------------------------------------------------


def summary(duels: Sequence[Duel], weights: int) -> dict[str, Any]:
    """The JSON object; medians throughout. `weights` are those of one expert."""
    ceiling = {
        str(threads): rounded(median(gbps for d in duels if d.threads == threads for gbps in d.ceiling))
        for threads in sorted({d.threads for d in duels})
    }
    ratios = [
        {
            "ours": d.ours.format,
            "against": d.theirs.format,
            "threads": d.threads,
            "batch": d.batch,
            "gweights_s_ratio": rounded(median(ratios_of(d))),
        }
        for d in duels
    ]
    return {"ceiling_gbps": ceiling, "rows": rows_of(duels, weights), "ratios": ratios}


def rows_of(duels: Sequence[Duel], weights: int) -> list[dict[str, Any]]:
    """One for each program, format and setting, from all its passes, whomever they were against."""
    found: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for d in sorted(duels, key=lambda d: (d.batch, d.threads)):
        for program, side in (("kimi-local", d.ours), ("llama.cpp", d.theirs)):
            passes = found.setdefault((program, side.format, side.bpw, d.threads, d.batch), [])
            passes.extend(zip(d.ceiling, side.visits, strict=True))
    names = "program", "format", "bpw", "threads", "batch"
    rows = [(dict(zip(names, key, strict=True)), passes) for key, passes in found.items()]
    return [row | speed(passes, row["bpw"], weights, row["batch"]) for row, passes in rows]


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
    return [ours / theirs for ours, theirs in zip(d.ours.visits, d.theirs.visits, strict=True)]


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
        setting = f"{d.ours.format} / {d.theirs.format}, {d.threads} thread(s), batch {d.batch}"
        print(f"  {setting:52} {median(found):.2f}  ({min(found):.2f} to {max(found):.2f})")
    print(json.dumps(result))


# --- the run -------------------------------------------------------------------------------------------------------


def our_program(layer: Layer) -> Program:
    error = partial(relative_error, layer)
    return Program("kimi-local", layer.format, layer.bits, layer.experts, layer.step, error, set_num_threads)


def gemm_program(layer: Layer) -> Program:
    """Ours, decoded and multiplied by torch."""
    other = decoded(layer, torch_gemm(1))

    def set_threads(threads: int) -> None:
        set_num_threads(threads)
        torch_gemm(threads)

    return our_program(other)._replace(format=f"{layer.format} gemm", set_threads=set_threads)


@contextmanager
def their_program(ggml: Ggml, layout: Layout, pattern: Projections, options: argparse.Namespace) -> Iterator[Program]:
    """llama.cpp with as many bytes of experts; freed at the end."""
    quantized = [ggml.quantize(layout.type, matrix) for matrix in pattern]
    raw, rows = (Projections(*parts) for parts in zip(*quantized, strict=True))
    stored = ggml.bytes_per_expert(layout.type, options.shape)
    experts = GgmlExperts(ggml, layout, options.shape, enough(options.gb, stored), ACTIVE)
    with closing(experts):
        experts.fill(raw)
        bits, error = 8 * stored / options.shape.weights, partial(their_error, experts, rows)
        yield Program("llama.cpp", layout.name, bits, experts.count, experts.step, error, ggml.set_threads)


def compare(
    ggml: Ggml, name: str, layouts: Sequence[Layout], pattern: Projections, options: argparse.Namespace
) -> Iterator[Duel]:
    """A format of ours, in memory once, against one after another of theirs."""
    layer = random_layer(name, options.gb, np.random.default_rng(options.seed), options.shape)
    ours = our_program(layer)
    check(ours, options)
    many = crowded(options.batch)
    decoding = gemm_program(layer) if many else ours
    if many:
        check(decoding, options, many)
    for layout in layouts:
        with their_program(ggml, layout, pattern, options) as theirs:
            check(theirs, options)
            yield from duel(ours, theirs, layer.memory[:READ_BYTES], options, options.batch)
            yield from duel(decoding, theirs, layer.memory[:READ_BYTES], options, many)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns the JSON object."""
    ggml = Ggml()
    layouts = {
        ours: [layout for theirs in types for layout in ggml.layouts(theirs, options.shape, ACTIVE)]
        for ours, types in options.pairs.items()
    }
    require_memory(options.gb)
    print_machine(ggml, options)
    ceiling = torch_ceiling(options) if crowded(options.batch) else {}
    pattern = random_rows(options.shape, np.random.default_rng(options.seed))
    duels = [d for name in layouts for d in compare(ggml, name, layouts[name], pattern, options)]
    result = ceiling | summary(duels, options.shape.weights)
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
    print(f"theirs:  llama-cpp-python {version('llama-cpp-python')}, ggml {ggml.version}, ", end="")
    print(" ".join(ggml.features) + (", as built: --isa changes only ours" if options.isa else ""))
    print(f"expert:  gate and up {options.shape.intermediate} x {options.shape.hidden}, down transposed; ", end="")
    print(f"{ACTIVE} a step of {options.gb:g} GB; {options.repetitions} x {options.seconds:g} s each", flush=True)


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


def pairs(text: str) -> dict[str, list[str]]:
    """`ours:theirs,..` -> their types for each format of ours. Raises UsageError."""
    found: dict[str, list[str]] = {}
    for pair in text.split(","):
        ours, _, theirs = pair.partition(":")
        if ours not in FORMATS or not theirs:
            remedy = f"Write it like trellis2:iq2_xxs; ours are {', '.join(FORMATS)}."
            raise UsageError(f"{pair!r} is not a format of ours and a type of theirs.", remedy)
        found.setdefault(ours, []).append(theirs)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=pairs, default=PAIRS, help=f"ours:theirs, with commas; default {PAIRS}")
    parser.add_argument("--gb", type=float, default=4.0, help="of experts on each side")
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a pass, at least")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", choices=FORCED, help="compile ours, not theirs, for an older processor")
    options = parser.parse_args(arguments)
    options.shape = Shape(options.hidden, options.intermediate)
    if max(options.threads) > config.NUMBA_NUM_THREADS:
        raise UsageError(f"This machine has {config.NUMBA_NUM_THREADS} threads.", "Use a smaller --threads.")
    if min(options.repetitions, options.seconds, *options.shape) <= 0 or any(n % 64 for n in options.shape):
        raise UsageError("Counts must be positive, --hidden and --intermediate multiples of 64.")
    if options.gb < 0.01:
        raise UsageError("--gb is at least 0.01.")
    return options


def compile_for(isa: str | None) -> None:
    """Start the program again if our kernels are compiled for another CPU: Numba decides that when it is imported."""
    if isa and FORCED[isa][0] != config.CPU_NAME:
        force(isa)
        os.execv(sys.executable, sys.orig_argv)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
        compile_for(options.isa)
        run(options)
    except KimiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
