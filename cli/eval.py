"""`kimi-local eval`: what a model can do, on cases with checkable answers, and how well it predicts a text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import KV, Activations, Debug, Dtype, Threads, machine, option, output, parse_tokens
from cli.output import count, print_table, printable
from cli.streaming import Window, open_model, progress_line, read_texts, require_one_vocabulary, windows_of
from hybrid.errors import UsageError

if TYPE_CHECKING:
    from hybrid import Kimi
    from hybrid.chat.message import Message
    from hybrid.evaluation.run import Outcome
    from hybrid.evaluation.text import TextScore
    from hybrid.model.compare import Comparison
    from hybrid.progress import OnProgress

CACHE = 32768  # tokens, of all answers made at once
SHOWN = 200  # letters of what was asked and answered
INSTANT = "* Asked without the reasoning that cases of this skill begin with: this model has none."


_AGAINST = "Also the KL divergence, on the text, from this model of the same vocabulary."
_SKILL = "Only this skill; may be given several times."
_CASES = "Held-out cases per skill; 0 leaves skills out."
_TEXT = "UTF-8 text to predict, other than the held-out one that comes along; may be given several times."
_MAX = "Longest reply; by default twice the reference answer and 32."
_KV = "How MODEL's context is kept in memory; that of --against is as it was computed."
_DTYPE = "Of the resident weights; in float32 scores do not depend on --batch and --prefill-chunk."
_JSON = "The last line is one JSON object; nothing else is printed."


@dataclass(frozen=True)
class Options:
    """What was asked for; see the command."""

    model: str
    against: str | None
    skills: list[str]
    cases: int
    seed: int
    tokens: int | None
    ctx: int | None
    max_tokens: int | None
    batch: int
    prefill_chunk: int
    dtype: Dtype
    kv: KV
    activations: Activations
    threads: int

    def settings(self) -> dict[str, Any]:
        """What a score may depend on."""
        names = ("cases", "seed", "tokens", "ctx", "max_tokens", "batch", "prefill_chunk", "threads")
        return {name: getattr(self, name) for name in names} | {
            "dtype": self.dtype.value,
            "kv": self.kv.value,
            "activations": self.activations.value,
        }


@dataclass(frozen=True)
class Results:
    """All that was measured: every case, by skill; the text; the distance from another model."""

    outcomes: dict[str, list[Outcome]]
    text: TextScore
    against: Comparison | None
    seconds: float


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, demo or pocket.", show_default=False)],
    against: Annotated[str | None, option("--against", metavar="REF", env=False, help=_AGAINST)] = None,
    skill: Annotated[list[str] | None, option("--skill", metavar="NAME", env=False, help=_SKILL)] = None,
    cases: Annotated[int, option("--cases", metavar="N", env=False, min=0, help=_CASES, show_default=True)] = 500,
    seed: Annotated[
        int, option("--seed", metavar="N", env=False, help="Other numbers, other cases.", show_default=True)
    ] = 0,
    text: Annotated[list[Path] | None, option("--text", metavar="FILE", env=False, help=_TEXT)] = None,
    tokens: Annotated[
        int | None, option("--tokens", metavar="N", env=False, parser=parse_tokens, help="Predict so many at most.")
    ] = None,
    max_tokens: Annotated[
        int | None, option("-n", "--max-tokens", metavar="N", env=False, parser=parse_tokens, help=_MAX)
    ] = None,
    ctx: Window = None,
    batch: Annotated[
        int, machine("--batch", metavar="N", env=False, min=1, help="Answers made at once.", show_default=True)
    ] = 32,
    prefill_chunk: Annotated[
        int,
        machine("--prefill-chunk", metavar="N", env=False, min=1, help="Tokens of prompts a step.", show_default=True),
    ] = 256,
    dtype: Annotated[Dtype, machine("--dtype", env=False, help=_DTYPE, show_default=True)] = Dtype.float32,
    kv: Annotated[KV, machine("--kv", env=False, help=_KV, show_default=True)] = KV.auto,
    activations: Annotated[
        Activations, machine("--activations", env=False, help="What experts compute with.", show_default=True)
    ] = Activations.int8,
    threads: Threads = None,
    failures: Annotated[
        int, output("--failures", metavar="N", env=False, min=0, help="Show so many failed cases per skill.")
    ] = 0,
    json_output: Annotated[bool, output("--json", env=False, help=_JSON)] = False,
    debug: Debug = False,
) -> None:
    """Score a model: arithmetic, copying, looking up, calling tools, and predicting text.

    Every case has an answer that can be checked. Answers are greedy, and each score has its 95 % interval beside it.
    Perplexity is per token of the model's own vocabulary; bits per byte compare models that have different ones.

      kimi-local eval pocket

      kimi-local eval /models/packed --against /models/Kimi-K2.5 --skill tool_call --cases 100
    """
    began = time.monotonic()
    chosen = chosen_skills(skill or []) if cases else []
    texts = [content for content, _ in read_texts(text or [_heldout()])]
    if tokens is not None and tokens < 2:
        raise UsageError("A single token is not predicted from anything.", "Use more --tokens.")
    from hybrid.device import use_threads

    options = Options(
        model, against, chosen, cases, seed, tokens, ctx, max_tokens, batch, prefill_chunk, dtype, kv, activations,
        use_threads(threads),
    )  # fmt: skip
    outcomes, text_score, comparison = measure(options, texts)
    results = Results(outcomes, text_score, comparison, time.monotonic() - began)
    if json_output:
        print(json.dumps(as_dict(options, results, failures), ensure_ascii=False))
    else:
        show(options, results, failures)


def chosen_skills(names: list[str]) -> list[str]:
    """The skills to score, all of them if none is named. Raises UsageError for one that is unknown."""
    from hybrid.evaluation.skills import SKILLS

    for name in names:
        if name not in SKILLS:
            raise UsageError(f"There is no skill {name!r}.", f"There are {', '.join(SKILLS)}.")
    return list(dict.fromkeys(names)) or list(SKILLS)


def _heldout() -> Path:
    from hybrid.evaluation.text import HELDOUT

    return HELDOUT


# -- measuring --------------------------------------------------------------------------------------------------------
def measure(options: Options, texts: list[str]) -> tuple[dict[str, list[Outcome]], TextScore, Comparison | None]:
    """What can be refused is refused before the long part, which is the skills."""
    from hybrid.evaluation.run import run_skills
    from hybrid.evaluation.text import read_text

    with progress_line() as report:
        comparison = _compare(options, options.against, texts, report) if options.against else None
        with _load(options, report) as kimi:
            text = read_text(kimi, windows_of(kimi, texts, options.ctx, options.tokens), report)
            outcomes = run_skills(
                kimi,
                options.skills,
                options.cases,
                seed=options.seed,
                batch=options.batch,
                max_tokens=options.max_tokens,
                report=report,
            )
    return outcomes, text, comparison


def _load(options: Options, report: OnProgress) -> Kimi:
    from hybrid import Kimi

    return Kimi.load(
        options.model,
        dtype=options.dtype.value,
        kv=options.kv.value,
        activations=options.activations.value,
        threads=options.threads,
        ctx=options.ctx if options.ctx and options.ctx > CACHE else None,
        cache=CACHE,
        prefill_chunk=options.prefill_chunk,
        on_progress=report,
    )


def _compare(options: Options, reference: str, texts: list[str], report: OnProgress) -> Comparison:
    """Both a layer at a time, so that they need not fit in memory together."""
    from hybrid.kimi import DTYPES
    from hybrid.model.compare import compare
    from hybrid.model.streamed import on_cpu

    placement = replace(on_cpu(options.activations.value, options.threads), dtype=DTYPES[options.dtype.value])
    with open_model(reference, report) as a, open_model(options.model, report) as b:
        require_one_vocabulary(a, b)
        shorter = min((a, b), key=lambda each: each.config.max_position_embeddings)
        windows = windows_of(shorter, texts, options.ctx, options.tokens)
        return compare(a, b, windows, placement, report, kv=options.kv.value)


# -- for programs -----------------------------------------------------------------------------------------------------
def as_dict(options: Options, results: Results, failures: int) -> dict[str, Any]:
    """The JSON form; skills hold "failures" if any were asked for."""
    from hybrid.evaluation.run import Score

    skills = {}
    for name, outcomes in results.outcomes.items():
        skills[name] = Score.of(outcomes).as_dict()
        if failures:
            skills[name]["failures"] = [_failure(each) for each in _failed(outcomes, failures)]
    return {
        "model": options.model,
        "settings": options.settings(),
        "skills": skills,
        "text": results.text.as_dict(),
        "against": results.against and _distance(options, results.against),
        "seconds": results.seconds,
    }


def _distance(options: Options, comparison: Comparison) -> dict[str, Any]:
    figures = {name: getattr(comparison, name) for name in ("kl_mean", "kl_p99", "top1")}
    return {"model": options.against, **figures}


def _failed(outcomes: list[Outcome], most: int) -> list[Outcome]:
    return [each for each in outcomes if not each.passed][:most]


def _failure(outcome: Outcome) -> dict[str, str]:
    return {
        "asked": outcome.case.messages[-1].content,
        "expected": _said(outcome.case.answer),
        "got": _said(outcome.reply),
        "finish_reason": outcome.finish_reason,
    }


def _said(message: Message) -> str:
    """Words and calls of an answer."""
    calls = [f"{call.name}({call.arguments})" for call in message.tool_calls]
    return "\n".join([message.content.strip(), *calls]).strip()


# -- for people -------------------------------------------------------------------------------------------------------
def show(options: Options, results: Results, failures: int) -> None:
    """Tables on standard output, then the failed cases that were asked for."""
    if results.outcomes:
        print_table(f"Skills of {options.model}", skill_rows(results.outcomes))
        if any(each.instant for outcomes in results.outcomes.values() for each in outcomes):
            print(INSTANT)
        print()
    print_table("Text", text_rows(options, results))
    for name, outcomes in results.outcomes.items():
        for outcome in _failed(outcomes, failures):
            print(f"\n{name}, {outcome.finish_reason}")
            failure = _failure(outcome)
            for key in ("asked", "expected", "got"):
                print(f"  {key:8}  {shorten(printable(failure[key]), SHOWN, placeholder=' ...') or 'nothing'}")


def skill_rows(outcomes: dict[str, list[Outcome]]) -> Iterator[tuple[str, str]]:
    """A skill, and its score."""
    from hybrid.evaluation.run import Score

    for name, each in outcomes.items():
        score = Score.of(each)
        figures = score.as_dict()
        bounds = f"{figures['low']:.1%} to {figures['high']:.1%}"
        yield name + " *" * bool(score.instant), f"{score.share:6.1%}  {bounds:16}  {score.passed} of {score.cases}"


def text_rows(options: Options, results: Results) -> Iterator[tuple[str, str]]:
    """What each figure is, and the figure."""
    text = results.text
    yield "tokens", count(text.tokens)
    yield "nats per token", f"{text.nats_per_token:.4f}"
    yield "perplexity", f"{text.perplexity:.3f}"
    yield "bits per byte", f"{text.bits_per_byte:.4f}"
    if results.against is not None:
        yield f"KL from {options.against}: mean", f"{results.against.kl_mean:.5f}"
        yield "99th percentile", f"{results.against.kl_p99:.5f}"
        yield "same likeliest token", f"{results.against.top1:.2%}"
