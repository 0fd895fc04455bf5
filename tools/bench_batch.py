"""Many answers at once: `python tools/bench_batch.py MODEL --sizes 1,4,16,64 --tokens 24 --rounds 3`.

Prompts of random ids are answered greedily, so many at a time, the sizes in turns; tokens count from the moment when
every answer has begun until the first ends. First what memory allows: weights read in a step, each expert once whoever
chose it, at the bandwidth that was measured. `model` says how much faster than the first size the others
would be if a step took longer only by the time to read its further experts. The last line is a JSON object.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from hybrid import Kimi, SamplingParams
from hybrid.device import default_threads
from hybrid.engine.request import Request
from hybrid.errors import KimiError, UsageError
from hybrid.kimi import PREFILL_CHUNK
from hybrid.memory.kv_format import PAGE_SIZE, pages_for
from quant.bandwidth import read_gbps

PROMPT = 8  # tokens of a prompt
CEILING_MB, PASSES = 1024, 5


@dataclass(frozen=True)
class Sample:
    """A stretch in which all answers were being made."""

    tokens: int
    seconds: float
    host_bytes: int  # weights read
    expert_bytes: int  # routed experts' among them


class Watch:
    """Notes when each token comes, and what was read until then."""

    def __init__(self, kimi: Kimi, size: int) -> None:
        self.model, self.size = kimi._engine.model, size
        self.begun: set[int] = set()
        self.marks: list[tuple[float, int, int]] = []  # since all have begun

    def over(self, index: int, request: Request) -> None:
        """Watch this request; for `Kimi.finish_many`."""

        def note(token: int) -> None:
            self.begun.add(index)
            if len(self.begun) == self.size:
                self.marks.append((time.perf_counter(), self.model.host_bytes, self.model.stats.expert_bytes))

        request.on_token = note

    def sample(self) -> Sample:
        """Of all marks so far."""
        (began, host, expert), *_, (ended, host_end, expert_end) = self.marks
        return Sample(len(self.marks) - 1, ended - began, host_end - host, expert_end - expert)


def longest(size: int, tokens: int) -> int:
    """Tokens of each of `size` answers: those that are to be counted, and a step for every chunk of prompts."""
    return tokens + -(-size * PROMPT // PREFILL_CHUNK)


def measure(kimi: Kimi, size: int, tokens: int, rng: random.Random) -> Sample:
    """`size` answers at once, of `tokens` tokens each after the last of them has begun."""
    kimi._engine.forget()
    prompts = [[rng.randrange(kimi.config.vocab_size) for _ in range(PROMPT)] for _ in range(size)]
    watch = Watch(kimi, size)
    params = SamplingParams(temperature=0, max_tokens=longest(size, tokens))
    ended = kimi.finish_many(prompts, params, batch=size, prepare=watch.over)
    next(ended)
    sample = watch.sample()
    for _ in ended:
        pass
    return sample


def figures(size: int, samples: Sequence[Sample], gbps: float) -> dict[str, float]:
    """Medians of the rounds for one size, beside what reading alone allows."""
    rate = median(each.tokens / each.seconds for each in samples)
    read = median(size * each.host_bytes / each.tokens for each in samples)
    return {
        "sequences": size,
        "tok_s": rate,
        "step_s": size / rate,
        "bound_tok_s": size * gbps * 1e9 / read,
        "gb_per_step": read / 1e9,
        "expert_gb_per_step": median(size * each.expert_bytes / each.tokens for each in samples) / 1e9,
    }


def beside(first: dict[str, float], found: dict[str, float], gbps: float) -> dict[str, float]:
    """The gain over the first row, and what the model makes of it."""
    longer = (found["expert_gb_per_step"] - first["expert_gb_per_step"]) / gbps
    alone = found["sequences"] / first["sequences"]
    return {
        "gain": found["tok_s"] / first["tok_s"],
        "model_gain": alone * first["step_s"] / (first["step_s"] + longer),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns the JSON object."""
    most = max(options.sizes)
    ctx = PROMPT + longest(most, options.tokens)
    cache = most * PAGE_SIZE * pages_for(ctx)
    gbps = read_gbps(CEILING_MB, options.threads or default_threads(), PASSES)
    if not options.json:
        print(f"reading: {gbps:.1f} GB/s", flush=True)
    with Kimi.load(options.model, threads=options.threads, dtype=options.dtype, ctx=ctx, cache=cache) as kimi:
        rng = random.Random(0)
        samples: dict[int, list[Sample]] = {size: [] for size in options.sizes}
        for _ in range(options.rounds + 1):  # the first warms up
            for size in options.sizes:
                samples[size].append(measure(kimi, size, options.tokens, rng))
        rows = [figures(size, samples[size][1:], gbps) for size in options.sizes]
        rows = [each | beside(rows[0], each, gbps) for each in rows]
        if not options.json:
            for each in rows:
                show(each)
        return {"model": kimi.name, "dtype": options.dtype, "ceiling_gbps": gbps, "rows": rows}


def show(row: dict[str, float]) -> None:
    print(
        f"{row['sequences']:4} at once: {row['tok_s']:7.2f} of at most {row['bound_tok_s']:.1f} tok/s, "
        f"{row['gb_per_step']:.2f} GB a step; {row['gain']:.2f} times the first, model {row['model_gain']:.2f}"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sizes", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=24, help="of each answer, all of them being made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    options = parser.parse_args(arguments)
    if options.tokens < 2 or options.rounds < 1 or min(options.sizes) < 1:
        raise UsageError("An answer has 2 tokens or more, a size is 1 or more, and there is a round at least.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        result = run(parse(arguments))
    except KimiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
