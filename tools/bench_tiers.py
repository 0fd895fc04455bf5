"""A pack from the NVMe tier: `python tools/bench_tiers.py PACK --ram-budget 2GiB [--tokens 32]`.

First the drive alone: experts read in a random order, as many at once and as directly as the tier reads them. Then the
pack with so much RAM for its experts decodes greedily; and, unless --no-ram or memory will not hold it, once more with
all of them in RAM, which must give the same tokens. The drive allows its bandwidth over the bytes read per token; drive
and processor together allow, at best, the slower of that and the speed from RAM. The last line is one JSON object.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cli.options import parse_bytes
from hybrid import Kimi, SamplingParams
from hybrid.checkpoint import Pack, open_checkpoint
from hybrid.errors import DoesNotFit, KimiError, UsageError
from hybrid.memory.direct import READERS, DirectFile
from quant import aligned

DRIVE_BYTES = 2 << 30  # read at most to measure the drive


class Run(NamedTuple):
    """Greedy decoding after a prompt."""

    ids: list[int]
    tok_s: float
    tier: dict[str, Any] | None  # what the tier counted while decoding


def drive_gbps(pack: Pack, seed: int) -> float:
    """Experts read at random, READERS at once, in GB/s."""
    records, blob_bytes = pack.manifest.layers, pack.shapes.blob_bytes
    blobs = [
        (layer, int(offset), blob_bytes(formats))
        for layer, record in records.items()
        for offset, formats in zip(record.offsets, record.formats, strict=True)
    ]
    order = np.random.default_rng(seed).permutation(len(blobs))
    chosen = [blobs[i] for i in order[: max(READERS, DRIVE_BYTES // max(size for _, _, size in blobs))]]
    with ExitStack() as stack, ThreadPoolExecutor(READERS) as pool:
        files = {layer: stack.enter_context(closing(DirectFile(pack.path / records[layer].file))) for layer in records}
        room = [aligned.empty((max(size for _, _, size in blobs),)) for _ in range(READERS)]
        start = time.perf_counter()
        lanes = [chosen[lane::READERS] for lane in range(READERS)]
        list(pool.map(lambda lane, target: _read_all(files, lane, target), lanes, room))
        return sum(size for _, _, size in chosen) / (time.perf_counter() - start) / 1e9


def _read_all(files: dict[int, DirectFile], blobs: Sequence[tuple[int, int, int]], target: np.ndarray) -> None:
    for layer, offset, size in blobs:
        files[layer].read(offset, [target[:size]])


def decode(options: argparse.Namespace, ram_budget: int | None) -> Run:
    """`options.tokens` tokens after the first. Raises DoesNotFit where there is no budget and too little memory."""
    with Kimi.load(options.pack, threads=options.threads, ctx=1024, ram_budget=ram_budget) as kimi:
        prompt = np.random.default_rng(options.seed).integers(0, 256, options.prompt).tolist()
        ids = kimi.generate(prompt, SamplingParams(temperature=0, max_tokens=options.tokens + 1))
        found = [next(ids)]
        before, start = kimi.expert_report()["tier"], time.perf_counter()
        found += ids
        seconds, after = time.perf_counter() - start, kimi.expert_report()["tier"]
    if after is None:
        return Run(found, (len(found) - 1) / seconds, None)
    counted = {name: after[name] - before[name] for name in before if name not in ("hit_rate", "slots", "slot_bytes")}
    asked = counted["hits"] + counted["misses"]
    facts = {"hit_rate": counted["hits"] / max(1, asked), "slots": after["slots"], "slot_bytes": after["slot_bytes"]}
    return Run(found, (len(found) - 1) / seconds, counted | facts)


def from_ram(options: argparse.Namespace) -> Run | None:
    """None where it was not asked for or memory is too small."""
    if not options.ram:
        return None
    try:
        run = decode(options, None)
    except DoesNotFit:
        return None
    return None if run.tier else run


def summary(options: argparse.Namespace, gbps: float, run: Run, ram: Run | None) -> dict[str, Any]:
    """Everything measured; `share` of what the drive allows, `share_of_both` of what drive and processor do."""
    assert run.tier is not None
    per_token = run.tier["nvme_bytes"] / (len(run.ids) - 1)
    allowed = gbps * 1e9 / per_token if per_token else float("inf")
    return {
        "pack": str(options.pack),
        "ram_budget": options.ram_budget,
        "threads": options.threads,
        "tokens": len(run.ids) - 1,
        "drive_gbps": gbps,
        "nvme_bytes_per_token": per_token,
        "tok_s": run.tok_s,
        "share": run.tok_s / allowed,
        "share_of_both": None if ram is None else run.tok_s / min(allowed, ram.tok_s),
        "ram_tok_s": None if ram is None else ram.tok_s,
        "same_tokens": None if ram is None else ram.ids == run.ids,
        **run.tier,
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"in RAM: {result['slots']} experts of {result['slot_bytes'] / 1e6:.1f} MB; {result['hit_rate']:.1%} of those"
    )
    print(f"        asked for were there, {result['foreseen']} more were read ahead, {result['evictions']} gave way")
    print(f"read:   {result['nvme_bytes_per_token'] / 1e6:.1f} MB per token, waited {result['stall_s']:.2f} s")
    print(f"speed:  {result['tok_s']:.2f} tok/s, {result['share']:.1%} of what the drive allows")
    if result["ram_tok_s"] is not None:
        same = "the same" if result["same_tokens"] else "OTHER"
        print(f"        {result['share_of_both']:.1%} of what drive and processor together do")
        print(f"RAM:    {result['ram_tok_s']:.2f} tok/s with all experts there, {same} tokens")
    print(json.dumps(result))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns the JSON object."""
    with open_checkpoint(options.pack) as pack:
        if not isinstance(pack, Pack) or not pack.config.moe_layers:
            raise UsageError(f"{options.pack} is no pack with routed experts.", "Make one: kimi-local quantize.")
        if options.ram_budget >= pack.manifest.expert_bytes:
            raise UsageError("All experts fit in that budget.", "Give a smaller --ram-budget.")
        gbps = drive_gbps(pack, options.seed)
    print(f"drive:  {gbps:.2f} GB/s, experts read in a random order, {READERS} at once", flush=True)
    found = decode(options, options.ram_budget)
    result = summary(options, gbps, found, from_ram(options))
    show(result)
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--ram-budget", required=True, type=parse_bytes, help="RAM for experts, as 2GiB")
    parser.add_argument("--tokens", type=int, default=32, help="decoded after the first")
    parser.add_argument("--prompt", type=int, default=8, help="tokens before them")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-ram", dest="ram", action="store_false", help="leave the run with all experts in RAM out")
    options = parser.parse_args(arguments)
    if min(options.tokens, options.prompt) < 1:
        raise UsageError("Counts must be 1 or more.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        result = run(parse(arguments))
    except KimiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 1 if result["same_tokens"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
