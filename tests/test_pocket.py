"""The shipped pocket model: what its card says is so, and nothing about how it is run changes an answer."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrid import Kimi, SamplingParams
from hybrid.evaluation.case import prompt_ids
from hybrid.evaluation.run import Outcome, run_skills
from hybrid.evaluation.skills import SKILLS, cases
from hybrid.pocket import pocket_path

CASES = 16
TRACE = Path(__file__).with_name("data") / "pocket_trace.npz"
PROMISED = tuple(skill for skill in SKILLS if skill != "arithmetic_instant")  # 95 % and more of 500 cases
ROW = re.compile(r"^\| (?P<skill>\w+) \| (?P<passed>\d+) of (?P<cases>\d+) \|", re.MULTILINE)


@pytest.fixture(scope="module")
def kimi() -> Iterator[Kimi]:
    with Kimi.load("pocket", dtype="float32", cache=16384) as kimi:
        yield kimi


@pytest.fixture(scope="module")
def outcomes(kimi: Kimi) -> dict[str, list[Outcome]]:
    return run_skills(kimi, SKILLS, CASES)


@pytest.fixture(scope="module")
def card() -> dict[str, float]:
    """The score of each skill."""
    text = (pocket_path() / "README.md").read_text()
    return {row["skill"]: int(row["passed"]) / int(row["cases"]) for row in ROW.finditer(text)}


def test_it_is_small_enough_to_come_along() -> None:
    assert sum(path.stat().st_size for path in pocket_path().iterdir()) <= 30e6


def test_the_card_keeps_the_promise(card: dict[str, float]) -> None:
    assert set(card) == set(SKILLS)
    assert all(card[skill] >= 0.95 for skill in PROMISED)


@pytest.mark.parametrize("skill", SKILLS)
def test_scores_are_those_of_the_card(skill: str, card: dict[str, float], outcomes: dict[str, list[Outcome]]) -> None:
    """A model that is computed wrongly fails nearly everything; one that is not passes this for all but one in 10,000
    draws of cases."""
    passed = sum(each.passed for each in outcomes[skill])
    deviation = (card[skill] * (1 - card[skill]) * CASES) ** 0.5
    assert passed >= card[skill] * CASES - 4 * deviation - 1


@pytest.mark.parametrize(("batch", "chunk"), [(1, 64), (5, 7), (64, 512)])
def test_batches_and_chunks_change_no_answer(
    kimi: Kimi, outcomes: dict[str, list[Outcome]], batch: int, chunk: int
) -> None:
    """The second and third time, prompts are read from the prefix cache, too."""
    few = 4
    kimi._engine.prefill_chunk = chunk
    again = run_skills(kimi, PROMISED, few, batch=batch)
    assert {skill: [each.reply for each in found] for skill, found in again.items()} == {
        skill: [each.reply for each in outcomes[skill][:few]] for skill in PROMISED
    }


def test_64_answers_at_once_are_the_64_single_ones(kimi: Kimi) -> None:
    """Prompts and answers of all lengths, and some answers cut short."""
    asked = [case for skill in SKILLS for case in cases(skill, "test", 7, 8)][:64]
    prompts = [prompt_ids(case, kimi.template, kimi.tokenizer) for case in asked]
    greedy = SamplingParams(temperature=0, stop_ids=kimi.stop_ids)
    params = [replace(greedy, max_tokens=4 + 3 * number) for number in range(64)]
    together = {index: ids for index, ids, _ in kimi.generate_many(prompts, params, batch=64)}
    singles = [list(kimi.generate(prompt, each)) for prompt, each in zip(prompts, params, strict=True)]
    assert len({len(prompt) for prompt in prompts}) > 20
    assert [together[index] for index in range(64)] == singles


def test_the_recorded_trace_is_of_this_model() -> None:
    with Kimi.load("pocket", ctx=64, threads=1) as kimi:
        config = kimi.config
    with np.load(TRACE) as file:
        chosen, domains, starts = file["chosen"], file["domains"].tolist(), file["starts"].tolist()
    assert chosen.shape[1:] == (len(list(config.moe_layers)), config.num_experts_per_tok)
    assert chosen.max() < config.n_routed_experts
    assert all(len(set(row)) == len(row) for row in chosen[::97].reshape(-1, chosen.shape[2]).tolist())
    assert domains == ["text", *SKILLS] and starts == sorted(starts) and starts[-1] < len(chosen)
