"""Decoding with and without ids guessed ahead: `python tools/bench_speculation.py MODEL --tokens 128 --rounds 5`.

First what there is to gain: steps of one to four rows are timed, and guesses that were all right would be so much
faster. Then two prompts are answered greedily, one that asks for a text to be copied and an ordinary one, in turns with
and without `--speculate auto`; medians of the rounds count. The first round, in which the gauge has yet to see what
steps take, counts too. The last line is a JSON object; ends with 1 if a float32 answer was another for it.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from hybrid import Kimi, SamplingParams
from hybrid.chat.message import Message
from hybrid.engine.speculation import ROWS, Gauge
from hybrid.errors import KimiError, UsageError
from hybrid.kimi import DTYPES
from hybrid.model.batch import Batch, Segment
from hybrid.stats import Stats

TEXT = (
    "The harbour at Lindow has two piers. The northern pier was built in 1871 and carries the crane, the ice house and "
    "the pilots' office. The southern pier is older and shorter, and only the ferry to Saltholm uses it in summer."
)
PROMPTS = {
    "copy": f"Repeat this text word for word, three times:\n\n{TEXT}",
    "plain": "Why is the sky blue, and why are sunsets red? Explain it to a child.",
}
PAST = 64  # tokens before the steps that are timed


def step_seconds(kimi: Kimi, rounds: int) -> list[float]:
    """Seconds of a step of 1 to ROWS rows of one sequence, head included: medians, taken in turns."""
    engine = kimi._engine
    ids = torch.arange(PAST + ROWS) % kimi.config.vocab_size
    pages: list[int] = []
    engine.kv.extend(pages, len(ids))
    taken: list[list[float]] = [[] for _ in range(ROWS)]
    try:
        engine.model.forward(Batch(ids[:PAST], (Segment(0, PAST, 0, tuple(pages)),)), engine.kv)
        for turn in range(ROWS * (4 * rounds + 1)):
            rows = turn % ROWS + 1
            began = time.perf_counter()
            segment = Segment(0, rows, PAST, tuple(pages))
            engine.model.head(engine.model.forward(Batch(ids[PAST : PAST + rows], (segment,)), engine.kv)).cpu()
            taken[rows - 1].append(time.perf_counter() - began)
    finally:
        engine.kv.release(pages)
    return [median(each[1:]) for each in taken]


def answer(kimi: Kimi, prompt: str, tokens: int, gauge: Gauge | None) -> tuple[str, Stats]:
    """From an empty cache: a prompt that is found there gives other last bits."""
    kimi._engine.forget()
    kimi._engine.gauge = gauge
    params = SamplingParams(temperature=0, max_tokens=tokens, stop_ids=kimi.stop_ids)
    reply = kimi.reply([Message("user", prompt)], params, thinking=False)
    list(reply)
    return reply.message.content, reply.stats


def compare(kimi: Kimi, prompt: str, options: argparse.Namespace, gauge: Gauge) -> dict[str, Any]:
    """Both ways, in turns."""
    off: list[float] = []
    on: list[float] = []
    same, drafted, accepted, tokens = True, 0, 0, 0
    for _ in range(options.rounds):
        text, stats = answer(kimi, prompt, options.tokens, None)
        off.append(stats.decode_tokens_per_s)
        ahead, stats = answer(kimi, prompt, options.tokens, gauge)
        on.append(stats.decode_tokens_per_s)
        same = same and ahead == text
        drafted, accepted, tokens = drafted + stats.drafted, accepted + stats.accepted, stats.generated_tokens
    slow, fast = median(off), median(on)
    return {
        "off_tok_s": slow,
        "auto_tok_s": fast,
        "gain": fast / slow if slow else None,
        "drafted": drafted,
        "accepted": accepted,
        "tokens": tokens,
        "same": same,
    }


def show(name: str, found: dict[str, Any]) -> None:
    gain = "" if found["gain"] is None else f", {found['gain']:.2f} times as fast"
    print(f"{name + ':':8}{found['off_tok_s']:.2f} tok/s without, {found['auto_tok_s']:.2f} with{gain}")
    same = "the same answers" if found["same"] else "OTHER answers"
    print(f"        {found['accepted']:,} of {found['drafted']:,} guesses right, {same}", flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns the JSON object."""
    exact = "float32" if options.dtype == "float32" else "int8"
    with Kimi.load(options.model, threads=options.threads, dtype=options.dtype, activations=exact) as kimi:
        seconds = step_seconds(kimi, options.rounds)
        ceiling = [(rows + 1) * seconds[0] / taken for rows, taken in enumerate(seconds)]
        if not options.json:
            print("steps:  " + ", ".join(f"{taken * 1000:.1f}" for taken in seconds) + f" ms for 1 to {ROWS} rows")
            print(f"        with every guess right {max(ceiling):.2f} times as fast at best", flush=True)
        result: dict[str, Any] = {"model": kimi.name, "dtype": options.dtype, "step_s": seconds, "ceiling": ceiling}
        gauge = Gauge()
        for name, prompt in PROMPTS.items():
            result[name] = compare(kimi, prompt, options, gauge)
            if not options.json:
                show(name, result[name])
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="float32: of the experts' inputs too")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    options = parser.parse_args(arguments)
    if options.tokens < 2 or options.rounds < 1:
        raise UsageError("An answer has 2 tokens or more, and there is a round at least.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
        result = run(options)
    except KimiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(result))
    return int(options.dtype == "float32" and not all(result[name]["same"] for name in PROMPTS))


if __name__ == "__main__":
    sys.exit(main())
