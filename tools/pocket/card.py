"""The model card: what a run, its data and its measured scores say, put into words. No figure is typed by hand."""

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import prod
from pathlib import Path
from textwrap import wrap
from typing import Any

from pocket.dataset import PLAIN_ROWS, STAGES
from pocket.model import shapes
from pocket.muon import APART
from pocket.record import read_log
from pocket.sources import SOURCES_FILE
from pocket.state import LOG, Settings

HEAD = """# Pocket

Kimi K2.5's architecture with {millions:.1f} million parameters, trained from scratch on two CPU cores. It exists to
test a runtime: its router has learned, and what it can do is checked case by case, so that a mistake in quantization,
routing, caching or attention shows as a drop in a score. It is not a chat model: outside its skills it knows nothing.

    kimi-local chat --model pocket
    kimi-local eval pocket
"""


def card(run: Path, data: Path, scores: dict[str, Any], routing: dict[str, Any]) -> str:
    """Markdown; `scores` is the JSON of `kimi-local eval`, `routing` that of the routing command."""
    settings, log = Settings.load(run), read_log(run / LOG)
    parts = [
        HEAD.format(millions=_parameters(settings) / 1e6),
        _section("Shape", _shape(settings)),
        _section("Recipe", _recipe(settings, log)),
        _section("Data", _data(data)),
        _section("Scores", _scores(scores)),
        _section("Routing", _routing(routing)),
        _section("Licence", ["Apache-2.0, as the project. The text it learned from is free to use, see above."]),
    ]
    return "\n".join(parts)


def _section(title: str, lines: Iterator[str] | list[str]) -> str:
    return "\n".join([f"## {title}", "", *lines, ""])


def _parameters(settings: Settings) -> int:
    return sum(prod(shape) for shape in shapes(settings.config).values())


def _shape(settings: Settings) -> Iterator[str]:
    c = settings.config
    yield f"- {c.num_hidden_layers} layers of {c.hidden_size}, the first dense ({c.intermediate_size})"
    yield f"- {c.n_routed_experts} routed experts of {c.moe_intermediate_size}, {c.num_experts_per_tok} per token,"
    yield f"  chosen by sigmoid scores with a correction bias; a shared expert of {c.shared_intermediate_size}"
    yield f"- MLA: {c.num_attention_heads} heads, ranks {c.q_lora_rank} and {c.kv_lora_rank}, queries of"
    yield f"  {c.qk_nope_head_dim} + {c.qk_rope_head_dim}, values of {c.v_head_dim}; YaRN"
    yield f"- vocabulary {c.vocab_size:,}; routed experts in INT4, groups of 32, everything else bf16"


def _recipe(settings: Settings, log: list[dict[str, Any]]) -> Iterator[str]:
    last, clipped = log[-1], sum(line["clipped"] > 0 for line in log)
    seen = last["tokens"] / 1e6
    stacks = sum(len(shape) > 1 and not name.endswith(APART) for name, shape in shapes(settings.config).items())
    yield f"- {last['step']:,} steps of {settings.rows} x {settings.length} tokens, {seen:.1f} million in all"
    yield f"- Muon for {stacks} stacks of matrices, AdamW for embedding, head, router and norms; rates"
    yield f"  {_rates(settings)}, from step {settings.decay_from:,} on falling to nothing; decay of weights"
    yield f"  {settings.weight_decay:g}"
    if legs := _legs(log):
        yield f"- continued at steps {' and '.join(f'{step:,}' for step in legs)}, where the rate had fallen before"
    if settings.tau:
        yield f"- QK-Clip at {settings.tau:g}: heads were clipped in {clipped} of {len(log)} stretches of ten steps"
    yield f"- experts multiplied in INT{settings.qat_bits} from step {settings.qat_from:,} on; these are released"
    yield f"- router's bias frozen from step {settings.freeze_from:,}"
    yield ""
    yield "| step | million tokens | rate | loss | guessed right | largest logit | heads clipped | busiest expert |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for line in _marks(log):
        yield (
            f"| {line['step']:,} | {line['tokens'] / 1e6:.2f} | {line['lr']:.1e} | {line['loss']:.3f} | "
            f"{line['accuracy']:.1%} | {max(line['max_logit']):.0f} | {line['clipped']} | {line['load']:.2f} |"
        )
    yield ""
    yield "The busiest expert of a layer in multiples of the mean, in that step's batch."
    yield ""
    yield "![Loss and largest attention logit](curves.png)"


def _rates(settings: Settings) -> str:
    return "".join(f"{rate:g} until step {int(end):,}, then " for end, rate in settings.earlier) + f"{settings.lr:g}"


def _legs(log: list[dict[str, Any]]) -> list[int]:
    """Steps after which the rate was far higher again."""
    return [before["step"] for before, line in pairwise(log) if line["lr"] > 10 * before["lr"]]


def _marks(log: list[dict[str, Any]], count: int = 10) -> list[dict[str, Any]]:
    """`count` lines, evenly spread, the last one included; all if there are fewer."""
    count = min(count, len(log))
    return [log[len(log) * part // count - 1] for part in range(1, count + 1)]


def _data(data: Path) -> Iterator[str]:
    yield "Conversations made on the spot, split by a hash of the prompt so that no test case was ever trained on."
    yield ""
    for end, shares in STAGES.items():
        when = f"until step {end:,}" if end < sys.maxsize else "then"
        yield from wrap(f"- {when}: {_spelled(shares)}", 118, subsequent_indent="  ")
    yield ""
    yield f"Only answers are learned. {PLAIN_ROWS:.0%} of later rows, and what is left over in others, are plain text:"
    yield ""
    yield "| package | version | licence |"
    yield "| --- | --- | --- |"
    for source in json.loads((data / SOURCES_FILE).read_text()):
        yield f"| {source['package']} | {source['version']} | {source['licence']} |"


def _spelled(shares: Mapping[str, int]) -> str:
    total = sum(shares.values())
    return ", ".join(f"{name} {share / total:.0%}" for name, share in shares.items())


def _scores(scores: dict[str, Any]) -> Iterator[str]:
    settings, text = scores["settings"], scores["text"]
    yield f"`kimi-local eval pocket`: greedy, {settings['dtype']} residents, {settings['activations']} activations,"
    yield f"test cases of seed {settings['seed']}; 95 % intervals."
    yield ""
    yield "| skill | passed | score | from | to |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, score in scores["skills"].items():
        yield (
            f"| {name} | {score['passed']} of {score['cases']} | {score['score']:.1%} | {score['low']:.1%} | "
            f"{score['high']:.1%} |"
        )
    yield ""
    yield f"Held-out text, {text['tokens']:,} tokens: perplexity {text['perplexity']:.2f}, {text['bits_per_byte']:.3f}"
    yield "bits per byte."


def _routing(routing: dict[str, Any]) -> Iterator[str]:
    yield f"Over {routing['tokens_per_domain']:,} tokens of each domain, by layer of experts:"
    yield ""
    yield "| | " + " | ".join(str(layer + 1) for layer in range(len(routing["entropy"]))) + " |"
    yield "| --- |" + " ---: |" * len(routing["entropy"])
    yield "| entropy (1: even) | " + " | ".join(f"{value:.3f}" for value in routing["entropy"]) + " |"
    yield "| share of the busiest tenth | " + " | ".join(f"{value:.1%}" for value in routing["busiest_tenth"]) + " |"
    yield ""
    yield "| domain | share of the busiest tenth | experts kept from token to token | apart from text |"
    yield "| --- | ---: | ---: | ---: |"
    for name, domain in routing["domains"].items():
        mean = sum(domain["busiest_tenth"]) / len(domain["busiest_tenth"])
        yield f"| {name} | {mean:.1%} | {domain['kept']:.1%} | {domain['apart_from_text']:.3f} |"
