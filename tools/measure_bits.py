"""What fewer bits cost a model: packs of several sizes, each scored by `kimi-local eval` against the model they are of.

    python tools/measure_bits.py pocket --cases 100
    python tools/measure_bits.py demo --cases 0 --tokens 4k --text abstracts.txt --calibrate other.txt

Without --calibrate the packs know nothing of how the model is used. KL is in nats per token on the text. Prints a table
in Markdown and, last, a JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BITS = (3.0, 2.5, 2.0, 1.8, 1.5)


def main() -> None:
    options = parse()
    try:
        rows = list(measure(options))
    except subprocess.CalledProcessError as error:
        print((error.stderr or error.stdout).strip().splitlines()[-1], file=sys.stderr)
        raise SystemExit(error.returncode) from None
    print("\n".join(table(rows)))
    print(json.dumps({"model": options.model, "calibrated": bool(options.calibrate), "rows": rows}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, demo or pocket")
    parser.add_argument("--bits", type=float, nargs="+", default=BITS, help="per weight of the experts")
    parser.add_argument("--cases", type=int, default=100, help="of each skill; 0: the text alone (default 100)")
    parser.add_argument("--tokens", help="of the text (default: all)")
    parser.add_argument("--text", nargs="+", help="UTF-8 files to predict (default: those of `kimi-local eval`)")
    parser.add_argument("--calibrate", nargs="+", metavar="FILE", help="UTF-8 files to calibrate the packs on")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Scores of the model itself, then of each pack, as JSON objects with `bits` (None: as the model is)."""
    asked = ["--cases", str(options.cases), "--json"]
    asked += [part for file in options.text or [] for part in ("--text", file)]
    asked += ["--tokens", options.tokens] if options.tokens else []
    yield {"bits": None, **scores(options.model, asked)}
    with tempfile.TemporaryDirectory() as scratch:
        prepared = calibration(options, Path(scratch))
        for bits in options.bits:
            pack = Path(scratch) / f"{bits:g}"
            kimi_local("quantize", options.model, str(pack), "--bits", f"{bits:g}", *prepared)
            yield {"bits": bits, **scores(str(pack), [*asked, "--against", options.model])}


def calibration(options: argparse.Namespace, scratch: Path) -> list[str]:
    """What `quantize` is told of how the model is used."""
    if not options.calibrate:
        return []
    files = [part for file in options.calibrate for part in ("--text", file)]
    kimi_local("calibrate", options.model, *files, "--out", str(scratch / "calibration"))
    return ["--calibration", str(scratch / "calibration")]


def scores(model: str, asked: list[str]) -> dict[str, Any]:
    """What `eval` says, in short."""
    said = json.loads(kimi_local("eval", model, *asked).splitlines()[-1])
    print(f"{model}: {said['seconds']:.0f} s", file=sys.stderr, flush=True)
    against = said["against"] or {"kl_mean": 0.0, "kl_p99": 0.0, "top1": 1.0}
    return {
        **{key: against[key] for key in ("kl_mean", "kl_p99", "top1")},
        "perplexity": said["text"]["perplexity"],
        "skills": {name: skill["score"] for name, skill in said["skills"].items()},
    }


def kimi_local(*arguments: str) -> str:
    """Its standard output. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, a row per size."""
    names = list(rows[0]["skills"])
    titles = ["bits", "KL", "same top token", "perplexity", *(name.replace("_", " ") for name in names)]
    lines = [titles, ["---:"] * len(titles)]
    for row in rows:
        bits = "as it is" if row["bits"] is None else f"{row['bits']:g}"
        figures = [bits, f"{row['kl_mean']:.3f}", f"{row['top1']:.1%}", f"{row['perplexity']:.1f}"]
        lines.append(figures + [f"{row['skills'][name]:.1%}" for name in names])
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    main()
