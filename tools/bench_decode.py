"""A whole model beside llama.cpp's, in one run: `python tools/bench_decode.py --model DIR [--types iq2_xxs]`.

DIR is a model of ours, best tools/make_mini.py's or a pack made of it. For each type a GGUF file of the same shape is
written, with random weights and the routed experts in that type (see peers_gguf.py), and runs in a process of its own
as llama.cpp sets itself up: memory-mapped, repacked where its CPU code repacks (--no-repack is its `--repack 0`, which
some processors with AMX need to run it at all). Passes take turns: reading memory, tokens of ours, of theirs, a prompt
for ours, for theirs. tg is greedy decoding after a short prompt, pp the time from a prompt to its first token. Both
wait for threads as hybrid tells OpenMP to (GOMP_SPINCOUNT); with OpenMP's own default (--openmp-default: llama.cpp's
threads only) a second program on the machine costs llama.cpp most of its speed.

What is comparable: shapes, tokens, threads and the machine. What is not: weights are random on both sides, so what
llama.cpp computes is checked for being numbers and no more, and how well a format keeps a real model's answers is not
seen here. Each side keeps the matrices every token needs in formats of its own (theirs q4_K and q6_K); bytes per token
count all of them. A share of the ceiling is bytes per token times tokens per second over the fastest plain reading of
the run. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import peers_gguf
import psutil
from bench_peers import cpu_model, rounded
from peers_ggml import Ggml

from hybrid import Kimi, SamplingParams
from hybrid.checkpoint import open_checkpoint
from hybrid.config import ModelConfig
from hybrid.errors import DoesNotFit, KimiError, UsageError
from quant.bandwidth import read_gbps
from quant.cpu import ISA

SHORT = 8  # tokens of the prompt before decoding
SPARE = 1 << 30  # bytes left to llama.cpp's buffers


class Seconds(NamedTuple):
    """Of one sequence: until the token after its prompt, and for the tokens after that one."""

    prompt: float
    decode: float


class Program(NamedTuple):
    """A loaded model and what one token of it reads."""

    name: str
    format: str  # of the routed experts
    bpw: float
    bytes_per_token: int
    run: Callable[[list[int], int], Seconds]  # prompt ids, further tokens


class Round(NamedTuple):
    """Tokens per second of neighbouring passes, and what memory gave just before."""

    ceiling: float  # GB/s
    tg: tuple[float, float]  # ours, theirs
    pp: tuple[float, float]


# --- ours ----------------------------------------------------------------------------------------------------------


@contextmanager
def our_program(options: argparse.Namespace) -> Iterator[Program]:
    """The model directory, loaded as chat loads it."""
    with open_checkpoint(options.model) as checkpoint:
        form = checkpoint.expert_format(checkpoint.config.moe_layers[0])
    with Kimi.load(options.model, threads=options.threads, ctx=context(options)) as kimi:
        model, config = kimi._engine.model, kimi.config
        total, routed = bytes_read(kimi, lambda: (model.host_bytes, model.stats.expert_bytes))
        weights = config.num_moe_layers * config.num_experts_per_tok * config.expert_params
        yield Program("kimi-local", form, 8 * routed / weights, total, partial(run_ours, kimi))


def context(options: argparse.Namespace) -> int:
    return max(options.prompt, SHORT) + options.tokens + 1


def greedy(kimi: Kimi, prompt: list[int], steps: int) -> Iterator[int]:
    return kimi.generate(prompt, SamplingParams(temperature=0, max_tokens=steps + 1))


def bytes_read(kimi: Kimi, counters: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """All weights, and those of routed experts, read for one token."""
    ids = greedy(kimi, list(range(SHORT)), 1)
    next(ids)
    before = counters()
    next(ids)
    return counters()[0] - before[0], counters()[1] - before[1]


def run_ours(kimi: Kimi, prompt: list[int], steps: int) -> Seconds:
    start = time.perf_counter()
    ids = greedy(kimi, prompt, steps)
    next(ids)
    first = time.perf_counter()
    count = sum(1 for _ in ids)
    assert count == steps, (count, steps)
    return Seconds(first - start, time.perf_counter() - first)


# --- theirs --------------------------------------------------------------------------------------------------------


class Llama:
    """tools/peers_llama.py at work, and the conversation with it."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        script = Path(__file__).with_name("peers_llama.py")
        settings = [str(options.threads), str(context(options)), str(int(options.repack))]
        command = [sys.executable, str(script), str(path), *settings]
        pipe, environment = subprocess.PIPE, dict(os.environ)
        if options.openmp_default:
            environment.pop("GOMP_SPINCOUNT", None)
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def loaded_bytes(self) -> int:
        """Of all tensors; to be asked first, and once."""
        return self._answer()["bytes"]

    def run(self, prompt: list[int], steps: int) -> Seconds:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # the answer, or that there is none, says what happened
            self.process.stdin.write(json.dumps({"prompt": prompt, "steps": steps}) + "\n")
            self.process.stdin.flush()
        answer = self._answer()
        return Seconds(answer["prompt_s"], answer["decode_s"])

    def _answer(self) -> dict[str, Any]:
        """Raises KimiError when it failed or ended, which a crash of llama.cpp looks like."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"llama.cpp ended with status {self.process.wait()}"}
        if "error" in answer:
            raise KimiError(f"{answer['error']}.", "Try --no-repack, or another of --types.")
        return answer

    def close(self) -> None:
        self.process.communicate()


@contextmanager
def their_program(kind: str, config: ModelConfig, options: argparse.Namespace) -> Iterator[Program]:
    """llama.cpp with a file written for it, which is removed at the end."""
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="peers-") as scratch:
        path = Path(scratch) / f"{kind}.gguf"
        require_room(peers_gguf.total_bytes(config, kind), scratch)
        size = peers_gguf.write_gguf(path, config, kind, options.seed)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # written back now rather than while something is timed
        print(f"llama.cpp {kind}: {size / 1e9:.2f} GB written", flush=True)
        with closing(Llama(path, options)) as llama:
            loaded = llama.loaded_bytes()
            assert loaded == size, (loaded, size)
            bits, read = peers_gguf.bits_per_weight(kind), peers_gguf.bytes_per_token(config, kind)
            yield Program("llama.cpp", kind, bits, read, llama.run)


def require_room(size: int, scratch: str) -> None:
    """The file needs its size on disk and again in memory, beside our model."""
    for needed, free, what in (
        (size, psutil.disk_usage(scratch).free, "disk in the --scratch directory"),
        (size + SPARE, psutil.virtual_memory().available, "memory"),
    ):
        if needed > free:
            raise DoesNotFit(
                f"llama.cpp's model needs {needed / 1e9:.1f} GB of {what}; {free / 1e9:.1f} GB are free.",
                "Use a model of fewer experts, or other --types.",
            )


# --- timing --------------------------------------------------------------------------------------------------------


def rounds(ours: Program, theirs: Program, vocab: int, options: argparse.Namespace) -> Iterator[Round]:
    """Endless rounds, the first of which also brings everything into memory: do not count it."""
    rng = np.random.default_rng(options.seed)
    while True:
        short, long = (rng.integers(0, vocab, count).tolist() for count in (SHORT, options.prompt))
        ceiling = read_gbps(256, options.threads, 3)
        tg = tuple(options.tokens / program.run(short, options.tokens).decode for program in (ours, theirs))
        pp = tuple(options.prompt / program.run(long, 0).prompt for program in (ours, theirs))
        yield Round(ceiling, (tg[0], tg[1]), (pp[0], pp[1]))


class Duel(NamedTuple):
    """Ours against one of theirs."""

    ours: Program
    theirs: Program
    rounds: list[Round]

    def ratios(self, of: str) -> list[float]:
        """Ours / theirs, round by round, of "tg" or "pp"."""
        return [ours / theirs for ours, theirs in (getattr(found, of) for found in self.rounds)]


def summary(duels: Sequence[Duel], ceiling: float, threads: int) -> dict[str, Any]:
    """The JSON object; `ceiling` is the best of reading alone, in GB/s. Medians throughout."""
    ceiling = max([ceiling, *(found.ceiling for duel in duels for found in duel.rounds)])
    rows = [row(duels[0].ours, [found for duel in duels for found in duel.rounds], 0, ceiling, threads)]
    rows += [row(duel.theirs, duel.rounds, 1, ceiling, threads) for duel in duels]
    return {"ceiling_gbps": rounded(ceiling), "rows": rows, "ratios": [ratio(duel) for duel in duels]}


def row(program: Program, found: Sequence[Round], side: int, ceiling: float, threads: int) -> dict[str, Any]:
    tokens, prompt = (median(getattr(one, of)[side] for one in found) for of in ("tg", "pp"))
    return {
        "program": program.name,
        "format": program.format,
        "bpw": rounded(program.bpw),
        "threads": threads,
        "tg_tok_s": rounded(tokens),
        "pp_tok_s": rounded(prompt),
        "bytes_per_token": program.bytes_per_token,
        "share": rounded(program.bytes_per_token * tokens / 1e9 / ceiling),
    }


def ratio(duel: Duel) -> dict[str, Any]:
    values: dict[str, Any] = {"against": duel.theirs.format}
    for of in ("tg", "pp"):
        found = duel.ratios(of)
        values |= {of: rounded(median(found)), f"{of}_range": [rounded(min(found)), rounded(max(found))]}
    return values


def print_summary(result: Mapping[str, Any]) -> None:
    """The table, the ratios with their range, and the JSON object as last line."""
    print(f"\nceiling: {result['ceiling_gbps']:.2f} GB/s\n")
    print(f"{'program':12}{'experts':18}{'bits':>6}{'tg tok/s':>10}{'pp tok/s':>10}{'GB/token':>10}{'share':>8}")
    for entry in result["rows"]:
        print(f"{entry['program']:12}{entry['format']:18}{entry['bpw']:6.3f}{entry['tg_tok_s']:10.2f}", end="")
        print(f"{entry['pp_tok_s']:10.2f}{entry['bytes_per_token'] / 1e9:10.3f}{entry['share']:8.1%}")
    print("\nours / theirs, median (and range) of neighbouring passes; random weights, so speed only:")
    for entry in result["ratios"]:
        tg, pp = (
            f"{entry[of]:.2f} ({' to '.join(f'{end:.2f}' for end in entry[f'{of}_range'])})" for of in ("tg", "pp")
        )
        print(f"  {entry['against']:18} tg {tg}   pp {pp}")
    print(json.dumps(result))


# --- the run -------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns the JSON object."""
    config = shared_config(options)
    ceiling = read_gbps(options.ceiling_mb, options.threads, 5)
    print(f"ceiling: {ceiling:.2f} GB/s read with {options.threads} thread(s)")
    print_machine(options)
    duels = []
    with our_program(options) as ours:
        for kind in options.types:
            with their_program(kind, config, options) as theirs:
                timed = islice(rounds(ours, theirs, config.vocab_size, options), 1, options.rounds + 1)
                duels.append(Duel(ours, theirs, list(timed)))
    result = summary(duels, ceiling, options.threads)
    print_summary(result)
    return result


def shared_config(options: argparse.Namespace) -> ModelConfig:
    """The shape of both models; what llama.cpp lacks or cannot store is said before minutes of loading."""
    with open_checkpoint(options.model) as checkpoint:
        config = checkpoint.config
    if not config.moe_layers:
        raise UsageError(f"{options.model} has no routed experts.", "Make a model: python tools/make_mini.py DIR")
    ggml = Ggml()
    for kind in options.types:
        ggml.type_of(kind)
        peers_gguf.total_bytes(config, kind)
    return config


def print_machine(options: argparse.Namespace) -> None:
    print(f"machine: {cpu_model()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}")
    print(f"ours:    {options.model}, kernels {ISA}")
    layout = "as it repacks by default" if options.repack else "--repack 0"
    print(f"theirs:  llama-cpp-python {version('llama-cpp-python')}, {layout}, random weights: speed only")
    print(f"passes:  {options.rounds} x (tg{options.tokens}, pp{options.prompt}), one of each before", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--types", type=lambda text: text.split(","), default=["iq2_xxs"], help="of llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="decoded in a pass")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt pass")
    parser.add_argument("--no-repack", dest="repack", action="store_false")
    parser.add_argument("--openmp-default", action="store_true", help="let llama.cpp's threads spin")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="directory for GGUF files")
    parser.add_argument("--ceiling-mb", type=int, default=1024, help="memory read for the first line")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if min(options.threads, options.rounds, options.tokens, options.prompt, options.ceiling_mb) < 1:
        raise UsageError("Counts must be 1 or more.")
    if not options.scratch.is_dir():
        raise UsageError(f"There is no directory {options.scratch}.", "Name one with --scratch.")
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
