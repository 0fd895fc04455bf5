"""Kill `kimi-local batch` at random moments, again and again, and compare what comes of it with an undisturbed run.

    python tools/kill_batch.py MODEL --lines 500 --kills 100

Half of the kills (SIGKILL) come soon after a line was answered, the others at any moment up to there. Prints one
line per kill and, last, a JSON object; ends with 1 if a line is lost, doubled or different.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

NEW_TOKENS = 24  # of the longest answer
FLEETING = ("id", "request_id", "created", "cached_tokens")  # of an answer: other in every run


def write_input(path: Path, lines: int, tokens: int = NEW_TOKENS) -> None:
    """A job of questions and texts, some of them nonsense, whose answers are drawn at random."""
    with path.open("w") as file:
        for number in range(lines):
            body: dict[str, Any] = {"max_tokens": 1 + number * 7 % tokens}
            if number % 3:
                body["messages"] = [{"role": "user", "content": f"Tell me about {number % 5} and {number}."}]
            else:
                body["prompt"] = f"The number {number} is"
            body |= {"n": 2} if number % 50 == 7 else {}
            url = "/v1/chat/completions" if number % 3 else "/v1/completions"
            file.write(json.dumps({"custom_id": f"q-{number}", "method": "POST", "url": url, "body": body}) + "\n")


def command(source: Path, out: Path, model: str, *more: str) -> list[str]:
    """All float32: rounding to int8 and bf16 would let answers depend, if rarely, on which lines were left to do."""
    program = [sys.executable, "-m", "cli.main", "batch", str(source), "-o", str(out), "-m", model]
    return [
        *program,
        "--dtype",
        "float32",
        "--activations",
        "float32",
        "--max-parallel",
        "8",
        "--threads",
        "1",
        "--quiet",
        *more,
    ]


def run(arguments: list[str]) -> float:
    """Seconds of a run to its end, which some lines of the input make 1."""
    began = time.monotonic()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    return time.monotonic() - began


def written(path: Path) -> int:
    """Whole lines in a file, 0 if it is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(arguments: list[str], out: Path, rng: random.Random, startup: float, pause: float) -> None:
    """Start the program and kill it, either at any moment or when it has begun to answer."""
    before = written(out)
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, startup + pause))
        else:
            while process.poll() is None and written(out) == before:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, pause))
        process.kill()


def essence(path: Path) -> Counter[str]:
    """The lines of an output, however often each is there, without what is new in every run."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in FLEETING}
        return [plain(item) for item in value] if isinstance(value, list) else value

    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(json.dumps(plain(json.loads(line)), sort_keys=True) for line in lines)


def compare(
    directory: Path, model: str, *, lines: int, kills: int, seed: int, tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """Run the job undisturbed and killed; how far the two outputs are apart."""
    rng = random.Random(seed)
    source, calm, torn = (directory / f"{name}.jsonl" for name in ("in", "calm", "torn"))
    write_input(source, lines, tokens)
    seconds = run(command(source, calm, model))
    startup = run(command(source, calm, model))  # nothing is left to do
    pause = 2 * max(seconds - startup, 0.1) / max(kills, 1)
    found, unfinished = {"lines": lines, "kills": kills, "seconds_undisturbed": round(seconds, 2)}, 0
    for number in range(1, kills + 1):
        kill(command(source, torn, model), torn, rng, startup, pause)
        unfinished += written(torn) < written(calm)
        print(f"kill {number}: {written(torn)} lines", file=sys.stderr, flush=True)
    run(command(source, torn, model))
    found["kills_with_lines_left"] = unfinished
    for name in ("jsonl", "errors.jsonl"):
        a, b = essence(calm.with_suffix(f".{name}")), essence(torn.with_suffix(f".{name}"))
        found |= {f"{name} lines": b.total(), f"{name} lost": (a - b).total(), f"{name} extra": (b - a).total()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256, help="of the longest answer: time in which to be killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        asked = {name: getattr(options, name) for name in ("lines", "kills", "seed", "tokens")}
        found = compare(Path(directory), options.model, **asked)
    print(json.dumps(found))
    sys.exit(any(value for name, value in found.items() if name.endswith(("lost", "extra"))))


if __name__ == "__main__":
    main()
