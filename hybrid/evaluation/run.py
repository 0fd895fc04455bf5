"""Skills, scored: cases answered greedily, many at once, each reply parsed and checked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from hybrid.chat.message import Message
from hybrid.chat.parser import ReplyParser
from hybrid.chat.reading import Reading
from hybrid.chat.tokenizer import Tokenizer
from hybrid.engine.sampler import SamplingParams
from hybrid.evaluation.case import Case, check, prompt_ids
from hybrid.evaluation.skills import cases
from hybrid.kimi import Kimi
from hybrid.progress import OnProgress, Progress, ignore

SIGMA = 1.959964  # 95 %
SPARE_TOKENS = 32  # beyond twice what the reference answer takes


@dataclass(frozen=True)
class Outcome:
    """What a model made of a case."""

    case: Case
    reply: Message
    finish_reason: str
    instant: bool  # the case asks for reasoning, and the model cannot

    @property
    def passed(self) -> bool:
        return check(self.case, self.reply)


@dataclass(frozen=True)
class Score:
    """How many of the cases of a skill were passed; `instant` of them had to be answered without their reasoning."""

    cases: int
    passed: int
    instant: int = 0

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Score":
        return cls(len(outcomes), sum(each.passed for each in outcomes), sum(each.instant for each in outcomes))

    @property
    def share(self) -> float:
        return self.passed / self.cases

    def as_dict(self) -> dict[str, Any]:
        """The JSON form; `low` and `high` bound the share at 95 % confidence."""
        low, high = wilson(self.passed, self.cases)
        counts = {"cases": self.cases, "passed": self.passed, "instant": self.instant}
        return {**counts, "score": self.share, "low": low, "high": high}


def wilson(passed: int, cases: int) -> tuple[float, float]:
    """Bounds of a share at 95 % confidence (Wilson's score interval): sound for few cases and for all passed, too."""
    share, weight = passed / cases, SIGMA**2 / cases
    middle = share + weight / 2
    reach = (weight * (share * (1 - share) + weight / 4)) ** 0.5
    low, high = (middle - reach) / (1 + weight), (middle + reach) / (1 + weight)
    return (low if passed else 0.0), (high if passed < cases else 1.0)


def run_skills(
    kimi: Kimi,
    skills: Iterable[str],
    count: int,
    *,
    seed: int = 0,
    batch: int = 32,
    max_tokens: int | None = None,
    report: OnProgress = ignore,
) -> dict[str, list[Outcome]]:
    """`count` held-out cases of each skill; longest reply `max_tokens`, by default as `longest_reply` says.

    Raises ContextExceeded, before computing anything, when a prompt does not fit.
    """
    drawn = {skill: list(cases(skill, "test", seed, count)) for skill in skills}
    # One of each skill in turn: they take differently long, and the time left is guessed from those that are done.
    mixed = list(chain.from_iterable(zip(*drawn.values(), strict=True)))
    outcomes: dict[str, list[Outcome]] = {skill: [] for skill in drawn}
    for outcome in answer(kimi, mixed, batch=batch, max_tokens=max_tokens, report=report):
        outcomes[outcome.case.skill].append(outcome)
    return outcomes


def answer(
    kimi: Kimi, asked: Sequence[Case], *, batch: int, max_tokens: int | None = None, report: OnProgress = ignore
) -> list[Outcome]:
    """Every case answered, greedily; without reasoning where the model has none."""
    prompts = [prompt_ids(_as_asked(case, kimi), kimi.template, kimi.tokenizer) for case in asked]
    greedy = SamplingParams(temperature=0, stop_ids=kimi.stop_ids)
    params = [replace(greedy, max_tokens=max_tokens or longest_reply(case, kimi.tokenizer)) for case in asked]
    outcomes: dict[int, Outcome] = {}
    report(Progress("skills", 0, len(asked), "cases"))
    for index, ids, why in kimi.generate_many(prompts, params, batch=batch):
        case = asked[index]
        reply = Reading(ReplyParser.after(prompts[index], kimi.tokenizer)).read(ids, kimi.stop_ids)
        outcomes[index] = Outcome(case, reply, why, case.thinking and not kimi.default_thinking)
        report(Progress("skills", len(outcomes), len(asked), "cases"))
    return [outcomes[index] for index in range(len(asked))]


def longest_reply(case: Case, tokenizer: Tokenizer) -> int:
    """Tokens a reply may take: twice those of the reference answer and some to spare."""
    calls = [text for call in case.answer.tool_calls for text in (call.id, call.arguments)]
    texts = [case.answer.reasoning_content or "", case.answer.content, *calls]
    return 2 * sum(len(tokenizer.encode(text)) for text in texts) + SPARE_TOKENS


def _as_asked(case: Case, kimi: Kimi) -> Case:
    return replace(case, thinking=case.thinking and kimi.default_thinking)
