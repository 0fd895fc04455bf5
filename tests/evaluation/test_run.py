"""Scores: who answers right passes, whoever else is in the batch; and text is scored as a direct computation would."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid import Kimi, SamplingParams
from hybrid.chat.template import DEFAULT_TEMPLATE, ChatTemplate
from hybrid.chat.tokenizer import KIMI_SPECIALS, Tokenizer
from hybrid.evaluation.case import Case, prompt_ids, reply_ids
from hybrid.evaluation.run import Score, answer, run_skills, wilson
from hybrid.evaluation.skills import SKILLS, cases
from hybrid.evaluation.text import HELDOUT, read_text
from hybrid.progress import Progress


class Oracle:
    """A model that knows every answer, except where it is told to be silent; it answers the last prompt first."""

    def __init__(self, known: Sequence[Case], *, thinking: bool = True, silent: frozenset[int] = frozenset()) -> None:
        self.tokenizer = Tokenizer(
            [bytes([byte]) for byte in range(256)], {256 + offset: name for offset, name in KIMI_SPECIALS.items()}
        )
        self.template = ChatTemplate(DEFAULT_TEMPLATE)
        self.stop_ids = self.tokenizer.stop_ids
        self.default_thinking = thinking
        self.answers = {}
        for number, case in enumerate(known):
            asked = replace(case, thinking=case.thinking and thinking)
            reply = reply_ids(asked, self.template, self.tokenizer)
            prompt = tuple(prompt_ids(asked, self.template, self.tokenizer))
            self.answers[prompt] = reply[-1:] if number in silent else reply

    def generate_many(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], *, batch: int
    ) -> Iterator[tuple[int, list[int], str]]:
        for index in reversed(range(len(prompts))):
            ids = self.answers[tuple(prompts[index])]
            assert params[index].temperature == 0 and len(ids) <= params[index].max_tokens
            assert ids[-1] in params[index].stop_ids
            yield index, ids, "stop"

    def as_kimi(self) -> Kimi:
        return cast(Kimi, self)


@pytest.mark.parametrize("skill", SKILLS)
def test_right_answers_pass_within_their_bound(skill: str) -> None:
    known = list(cases(skill, "test", 0, 12))
    outcomes = run_skills(Oracle(known).as_kimi(), [skill], 12)[skill]
    assert [each.case for each in outcomes] == known
    assert Score.of(outcomes) == Score(12, 12)
    silent = answer(Oracle(known, silent=frozenset({1, 4})).as_kimi(), known, batch=3)
    assert [number for number, each in enumerate(silent) if not each.passed] == [1, 4]


def test_progress_and_the_order_of_skills() -> None:
    seen: list[Progress] = []
    known = [case for skill in ("copy", "count") for case in cases(skill, "test", 5, 4)]
    outcomes = run_skills(Oracle(known).as_kimi(), ["copy", "count"], 4, seed=5, report=seen.append)
    assert {skill: [each.case for each in found] for skill, found in outcomes.items()} == {
        "copy": known[:4], "count": known[4:],
    }  # fmt: skip
    assert seen == [Progress("skills", done, 8, "cases") for done in range(9)]


def test_a_model_without_reasoning_is_asked_without() -> None:
    known = list(cases("arithmetic", "test", 0, 3)) + list(cases("copy", "test", 0, 3))
    outcomes = answer(Oracle(known, thinking=False).as_kimi(), known, batch=2)
    assert all(each.passed and each.reply.reasoning_content is None for each in outcomes)
    assert [each.instant for each in outcomes] == [case.thinking for case in known]
    assert Score.of(outcomes[:3]).instant == 3


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"),
    [(0, 10, 0.0, 0.27754), (5, 10, 0.23659, 0.76341), (10, 10, 0.72246, 1.0), (495, 500, 0.97678, 0.99572)],
)
def test_wilson_interval(passed: int, total: int, low: float, high: float) -> None:
    assert wilson(passed, total) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 10_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_share_lies_in_its_interval(counts: tuple[int, int]) -> None:
    passed, total = counts
    low, high = wilson(passed, total)
    assert 0 <= low <= passed / total <= high <= 1
    mirrored = wilson(total - passed, total)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


# -- with a real engine -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def kimi(tiny: Path) -> Iterator[Kimi]:
    with Kimi.load(tiny, dtype="float32", threads=1) as kimi:
        yield kimi


def test_scores_do_not_depend_on_batch_and_chunk(kimi: Kimi) -> None:
    """A random model fails everything, but always in the same words."""
    replies = []
    for batch, chunk in ((1, 64), (8, 64), (8, 1), (3, 256)):
        kimi._engine.prefill_chunk = chunk
        outcomes = run_skills(kimi, ["arithmetic_instant", "copy"], 3, batch=batch, max_tokens=12)
        replies.append([(each.reply, each.finish_reason) for found in outcomes.values() for each in found])
    assert len(replies[0]) == 6 and all(each == replies[0] for each in replies)


def test_text_is_scored_as_a_direct_computation_would(kimi: Kimi) -> None:
    text = "The first of many wörds is that it was not the last; " * 6
    ids = kimi.tokenizer.encode(text)
    windows = [ids[:40], ids[40:80], ids[80:120]]
    seen: list[Progress] = []
    found = read_text(kimi, windows, seen.append)
    nats = 0.0
    for window in windows:
        for place in range(1, len(window)):
            nats -= float(kimi.logits(window[:place])[-1].double().log_softmax(-1)[window[place]])
    letters = sum(len(kimi.tokenizer.decode(window[1:]).encode()) for window in windows)
    assert found.tokens == 3 * 39
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / (3 * 39)), rel=1e-4)
    # a window may begin in the middle of a letter, which decodes to three bytes
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / letters, rel=0.02)
    assert [each.done for each in seen] == [0, 1, 2]


def test_the_held_out_text_is_there() -> None:
    text = HELDOUT.read_text(encoding="utf-8")
    assert len(text) > 50_000 and "\r" not in text
