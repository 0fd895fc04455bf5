"""A long prompt at the first start and at the second: `python tools/bench_kv_disk.py MODEL --tokens 16384`.

First the drive alone: a file of the size of the prompt's rows, read past the page cache, as many pieces at once as rows
are. Then the program is started twice, each time as a process of its own, over a cache directory that was empty. Both
answer the same prompt; the second reads what the first computed, from the drive: the files are out of the page cache.
Times are from the request to the first token: loading is not in them, reading the rows is. The ids must be the same,
so the prompt has one token more than --tokens says: it is the one that both compute. The last line is a JSON object.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from program import own_cache

from cli.options import parse_tokens
from hybrid import Kimi, SamplingParams
from hybrid.chat.tokenizer import NUM_SPECIALS
from hybrid.checkpoint import open_checkpoint
from hybrid.engine.request import Request
from hybrid.errors import KimiError, UsageError
from hybrid.memory.direct import READERS, DirectFile
from hybrid.memory.disk_kv import FEWEST
from hybrid.memory.kv_cache import PAGE_SIZE
from hybrid.memory.kv_files import bytes_in
from hybrid.names import model_path
from hybrid.progress import ignore
from quant import aligned

PIECE = 1 << 24  # bytes asked for at a time
CEILING_BYTES = 2 << 30  # read at most to measure the drive
ROOM = 64 << 30


# -- the drive alone --------------------------------------------------------------------------------------------------
def drive_gbps(directory: Path, size: int) -> float:
    """Reading `size` bytes of a file in `directory` that is not in the page cache, in GB/s."""
    pieces = -(-size // PIECE)
    path = directory / "drive"
    with path.open("wb") as file:
        for _ in range(pieces):
            file.write(os.urandom(PIECE))
    forget_cached(path)
    with closing(DirectFile(path)) as opened, ThreadPoolExecutor(READERS) as pool:
        room = [aligned.empty((PIECE,)) for _ in range(READERS)]
        start = time.perf_counter()
        list(pool.map(lambda lane: _read(opened, range(lane, pieces, READERS), room[lane]), range(READERS)))
        seconds = time.perf_counter() - start
    path.unlink()
    return pieces * PIECE / seconds / 1e9


def _read(file: DirectFile, pieces: range, target: np.ndarray) -> None:
    for piece in pieces:
        file.read(piece * PIECE, [target])


def forget_cached(path: Path) -> None:
    """Have a file read from the drive next time."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


# -- one start --------------------------------------------------------------------------------------------------------
def answer(options: argparse.Namespace) -> dict[str, Any]:
    """What one process measures."""
    room = options.tokens + options.new + PAGE_SIZE
    with Kimi.load(options.model, threads=options.threads, ctx=room, kv_disk=ROOM) as kimi:
        rng = random.Random(options.seed)
        known = kimi.config.vocab_size - NUM_SPECIALS
        list(kimi.generate([rng.randrange(known) for _ in range(32)], SamplingParams(temperature=0, max_tokens=2)))
        rng.seed(options.seed + 1)
        prompt = [rng.randrange(known) for _ in range(options.tokens + 1)]
        request = Request(prompt, SamplingParams(temperature=0, max_tokens=options.new))
        start = time.perf_counter()
        stream = kimi._engine.stream(request)
        ids = [next(stream)]
        seconds = time.perf_counter() - start
        ids += stream
    return {"ids": ids, "first_token_s": seconds, "cached": request.cached_tokens, "disk": request.disk_tokens}


def start_program(options: argparse.Namespace, model: Path, cache: Path) -> dict[str, Any]:
    """The same in a process of its own, whose user's cache is `cache`; compiled kernels are where they are."""
    command = [sys.executable, __file__, str(model), "--once", f"--tokens={options.tokens}", f"--new={options.new}"]
    command += [f"--seed={options.seed}", *([f"--threads={options.threads}"] if options.threads else [])]
    done = subprocess.run(command, env=os.environ | own_cache(cache), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise KimiError(f"The program ended with {done.returncode}.", "What it said stands above.")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# -- all of it --------------------------------------------------------------------------------------------------------
def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns the JSON object."""
    model = Path(model_path(options.model, ignore))
    with open_checkpoint(model) as checkpoint:
        row_bytes = checkpoint.config.kv_bytes_per_token(2)

    def tell(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        cache = Path(directory)
        size = options.tokens * row_bytes
        gbps = drive_gbps(cache, min(size, CEILING_BYTES))
        allowed = f"{size / 1e6:,.1f} MB, {size / gbps / 1e9:.3f} s"
        tell(f"drive:  {gbps:.2f} GB/s; rows of {options.tokens:,} tokens are {allowed}")
        first = start_program(options, model, cache)
        tell(f"first:  {first['first_token_s']:.3f} s to the first token, {first['cached']:,} tokens found")
        kept = bytes_in(cache / "kimi-local" / "kv")
        for path in (cache / "kimi-local" / "kv").rglob("*.kv"):
            forget_cached(path)
        second = start_program(options, model, cache)
    ratio = second["first_token_s"] / first["first_token_s"]
    same = first["ids"] == second["ids"]
    tell(f"second: {second['first_token_s']:.3f} s, {second['disk']:,} tokens from the drive: {ratio:.2%} of the first")
    tell(f"        {'the same' if same else 'OTHER'} ids")
    return {
        "model": str(options.model),
        "tokens": options.tokens,
        "threads": options.threads,
        "drive_gbps": gbps,
        "row_bytes": row_bytes,
        "kept_bytes": kept,
        "first_s": first["first_token_s"],
        "second_s": second["first_token_s"],
        "ratio": ratio,
        "disk_tokens": second["disk"],
        "same_ids": same,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=parse_tokens, default=16384, help="of the prompt, whole pages of 64, as 16k")
    parser.add_argument("--new", type=int, default=16, help="tokens of the answer")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="on the drive to measure; by default the temporary one")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.tokens -= options.tokens % PAGE_SIZE
    if options.new < 1 or options.tokens < FEWEST:
        raise UsageError(f"A prompt has {FEWEST} tokens or more, and an answer 1.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
        result = answer(options) if options.once else run(options)
    except KimiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(result))
    return 0 if options.once or result["same_ids"] else 1


if __name__ == "__main__":
    sys.exit(main())
