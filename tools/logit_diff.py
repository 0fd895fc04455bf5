"""How far the runtime's logits are from an oracle's: `python tools/logit_diff.py MODEL [--against transformers]`.

transformers: the native DeepSeek or Kimi class in float32 (a development dependency). reference: the slow float64 model
of the tests. int8: the runtime itself, from full-precision to int8 activations. The first two are compared with the
runtime in full precision unless --dtype or --activations say otherwise. The last line is JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/ is no installed package

from hybrid import Kimi
from hybrid.errors import KimiError

TEXT = """The tide tables on the harbour wall were painted by hand, and every spring somebody repainted them.
In 1912 the keeper, Ines Farrow, added a second column: not when the water would rise, but when it had. By the end of
the year the two columns differed by eleven minutes; she wrote to the office, twice, and was told the tables were right.

def rise(hours): return sum(0.5 * abs(math.sin(k * hours)) for k in range(1, 4))  # metres, above the lowest mark
"""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    try:
        expected, found, token_ids = answers(options)
    except KimiError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    result = {"model": options.model.name, "against": options.against, "dtype": options.dtype}
    result |= {"activations": options.activations, "tokens": len(token_ids)} | compare(expected, found)
    print(f"{options.model.name}: {len(token_ids)} tokens, runtime against {options.against}")
    for name, meaning in MEANING.items():
        print(f"  {meaning:<58} {result[name]:.6g}")
    position = result["worst_position"]
    print(f"  worst position {position} (token {token_ids[position]}): relative error {result['worst_error']:.3g}")
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="UTF-8 file to run over (default: a paragraph of this program's)")
    parser.add_argument("--against", choices=("transformers", "reference", "int8"), default="transformers")
    parser.add_argument("--tokens", type=int, default=128, help="use this many tokens of the text (default 128)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--activations", choices=("float32", "int8"), help="default: float32, or int8 against int8")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.activations = options.activations or ("int8" if options.against == "int8" else "float32")
    return options


def answers(options: argparse.Namespace) -> tuple[Tensor, Tensor, list[int]]:
    """Logits [T, vocab] of the oracle and of the runtime, and the T token ids."""
    text = options.text.read_text(encoding="utf-8") if options.text else TEXT
    found, token_ids = runtime(options, text, options.activations)
    if options.against == "int8":
        return runtime(options, text, "float32")[0], found, token_ids
    from tests.model.oracle import read_case, transformers_logits, transformers_model
    from tests.reference import Reference

    case = read_case(options.model)
    if options.against == "reference":
        return Reference(case.config, case.tensors).logits(token_ids), found, token_ids
    return transformers_logits(transformers_model(case), token_ids), found, token_ids


def runtime(options: argparse.Namespace, text: str, activations: str) -> tuple[Tensor, list[int]]:
    with Kimi.load(options.model, dtype=options.dtype, threads=options.threads, activations=activations) as kimi:
        token_ids = kimi.tokenizer.encode(text)[: options.tokens]
        return kimi.logits(token_ids), token_ids


MEANING = {
    "relative_error": "|found - expected| / |expected|, all logits",
    "max_abs": "largest difference of one logit",
    "kl": "KL(expected || found), nats per token",
    "kl_worst": "the same at the worst position",
    "top1_agreement": "share of positions with the same likeliest token",
}


def compare(expected: Tensor, found: Tensor) -> dict[str, float | int]:
    """The figures of MEANING and the worst position, for two [T, vocab] logits."""
    expected, found = expected.double(), found.double()
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return {
        "relative_error": float((found - expected).norm() / expected.norm()),
        "max_abs": float((found - expected).abs().max()),
        "kl": float(kl.mean()),
        "kl_worst": float(kl.max()),
        "top1_agreement": float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
        "worst_position": int(errors.argmax()),
        "worst_error": float(errors.max()),
    }


if __name__ == "__main__":
    main()
