"""Guesses are what a slow search finds, tried only where they pay, and no answer is another for them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybrid import Kimi, SamplingParams
from hybrid.chat.message import Message
from hybrid.engine.engine import Engine
from hybrid.engine.request import Request
from hybrid.engine.speculation import ENOUGH, MOST, ROWS, SELDOM, SIZES, Drafter, Gauge
from hybrid.errors import KimiError
from hybrid.memory.kv_cache import PAGE_SIZE
from hybrid.stats import Stats

GREEDY = SamplingParams(temperature=0, max_tokens=40, logprobs=2)
DRAW = torch.Generator().manual_seed(11)
RANDOM = torch.randint(3, 300, (90,), generator=DRAW).tolist()
PROMPTS = [[7, 8, 9] * 12, RANDOM[:50] * 2, RANDOM, [5], [3] * 61, RANDOM[:30] + RANDOM[10:30] + RANDOM[:12]]


# -- guesses ----------------------------------------------------------------------------------------------------------
def slow_draft(ids: Sequence[int]) -> list[int]:
    """Look at every place, the newest first."""
    for size in SIZES:
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == ids[-size:]:
                follows = list(ids[end:])
                while len(follows) < MOST:
                    follows += ids[end:]
                return follows[:MOST]
    return []


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(1, 5), max_size=60))
def test_a_draft_is_what_a_search_finds(ids: list[int], steps: list[int]) -> None:
    drafter, stop = Drafter(), 0
    for step in [*steps, len(ids)]:
        stop = min(len(ids), stop + step)
        assert drafter.draft(ids[:stop]) == slow_draft(ids[:stop])


def test_hope_is_how_many_would_have_been_right() -> None:
    drafter = Drafter()
    assert drafter.draft([1, 2, 9, 8, 7, 1, 2]) == [9, 8, 7]
    drafter.draft([1, 2, 9, 8, 7, 1, 2, 9, 8])  # not all of it has come
    assert drafter.hope == [0, 0, 0, 0]
    drafter.draft([1, 2, 9, 8, 7, 1, 2, 9, 8, 5])
    assert drafter.hope == [0, 1, 2, 2]


def test_hope_follows_the_text() -> None:
    drafter = Drafter()
    ids = [1, 2, 3, 4] * 30
    for stop in range(len(ids)):
        drafter.draft(ids[:stop])
    assert drafter.hope == [0, 1, 2, 3]
    for token in range(500, 900):
        for each in (2, 3, token):
            ids.append(each)
            drafter.draft(ids)
    assert drafter.hope[1] < 0.2


# -- whether they pay -------------------------------------------------------------------------------------------------
def steps(gauge: Gauge, count: int, cost: float, hope: Sequence[float], sequences: int = 1) -> list[int]:
    """What is chosen in `count` steps that take a second, and `cost` seconds more for every row that was drafted."""
    chosen = []
    for _ in range(count):
        most = gauge.choose(sequences, [hope])
        gauge.note(sequences, sequences + most, 1 + cost * most)
        chosen.append(most)
    return chosen


RIGHT = [0.0, 0.9, 1.7, 2.4]


def test_what_pays_is_done_nearly_always() -> None:
    chosen = steps(Gauge(), 1000, 0.1, RIGHT)
    assert chosen.count(MOST) > 960 and chosen.count(0) > ENOUGH


def test_as_many_are_drafted_as_pay_best() -> None:
    falling = [0.0, 0.9, 1.0, 1.0]
    assert steps(Gauge(), 100, 0.3, falling)[-1] == 1


def test_what_does_not_pay_is_hardly_ever_tried() -> None:
    gauge = Gauge()
    first = steps(gauge, 160, 1.0, RIGHT)
    assert sum(map(bool, first)) <= ENOUGH * MOST + 160 / 16
    later = steps(gauge, 10 * SELDOM, 1.0, RIGHT)
    assert 0 < sum(map(bool, later)) <= 20


def test_what_comes_to_pay_is_noticed_and_what_ceases_to_too() -> None:
    gauge = Gauge()
    assert steps(gauge, 100, 1.0, RIGHT)[-1] == 0
    assert MOST in steps(gauge, 20 * SELDOM, 0.1, RIGHT)[-2:]
    assert steps(gauge, 200, 2.0, RIGHT)[-1] == 0


def test_where_nothing_would_be_right_nothing_is_tried() -> None:
    assert set(steps(Gauge(), 200, 0.0, [0.0, 0.05, 0.05, 0.05])) == {0}


def test_a_slow_step_among_others_changes_nothing() -> None:
    gauge = Gauge()
    steps(gauge, 50, 0.1, RIGHT)
    gauge.note(1, ROWS, 1000.0)
    assert steps(gauge, 2, 0.1, RIGHT) == [MOST, MOST]


def test_steps_have_no_more_rows_than_they_may() -> None:
    gauge = Gauge()
    assert max(steps(gauge, 100, 0.0, RIGHT, sequences=2)) == ROWS - 2
    assert gauge.choose(ROWS, [RIGHT]) == gauge.choose(1, []) == 0
    assert max(gauge.choose(2, [RIGHT, RIGHT]) for _ in range(100) if gauge.note(2, 2, 1.0) is None) <= 1


# -- answers ----------------------------------------------------------------------------------------------------------
class Eager(Gauge):
    """Always for it."""

    def choose(self, sequences: int, hopes: Sequence[Sequence[float]]) -> int:
        return (ROWS - sequences) // max(1, len(hopes))


@pytest.fixture(scope="module")
def kimi(tiny: Path) -> Iterator[Kimi]:
    exact = {"dtype": "float32", "activations": "float32"}
    with Kimi.load(tiny, **exact, ctx=192, cache=640, threads=1, speculate=True) as kimi:  # type: ignore[arg-type]
        yield kimi


@pytest.fixture(scope="module")
def engine(kimi: Kimi) -> Engine:
    return kimi._engine


def answer(engine: Engine, request: Request, gauge: Gauge | None) -> tuple[list[int], Request]:
    engine.forget()
    engine.gauge = gauge
    return list(engine.stream(request)), request


def both(engine: Engine, prompt: list[int], params: SamplingParams, **more: object) -> tuple[Request, list[int]]:
    """The request with drafts and its answer, the same as without."""
    ids, plain = answer(engine, Request(list(prompt), params, **more), None)  # type: ignore[arg-type]
    ahead, request = answer(engine, Request(list(prompt), params, **more), Eager())  # type: ignore[arg-type]
    assert ahead == ids and request.finish_reason == plain.finish_reason and plain.drafted == 0
    assert [each.token for each in request.logprobs] == [each.token for each in plain.logprobs]
    assert [each.logprob for each in request.logprobs] == pytest.approx(
        [each.logprob for each in plain.logprobs], abs=1e-3
    )
    return request, ids


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        replace(GREEDY, temperature=0.7, seed=3),
        replace(GREEDY, repetition_penalty=1.05, frequency_penalty=0.2),
        replace(GREEDY, temperature=1.0, top_p=0.5, seed=1, presence_penalty=0.5),
    ],
)
def test_answers_are_the_same(engine: Engine, prompt: list[int], params: SamplingParams) -> None:
    both(engine, prompt, params)


def test_guesses_come_true_and_steps_are_saved(engine: Engine) -> None:
    before = engine.model.steps
    request, ids = both(engine, [7] * 20, replace(GREEDY, logit_bias=((7, 100.0),)))
    assert ids == [7] * 40 and request.accepted == request.drafted > 25
    assert engine.model.steps - before <= 41 + 15


def test_the_context_and_the_limit_end_it_as_ever(engine: Engine) -> None:
    for most in (1, 2, 3, 4, 5, 6, 7):
        request, ids = both(engine, PROMPTS[4], replace(GREEDY, max_tokens=most, logit_bias=((3, 100.0),)))
        assert request.finish_reason == "length" and len(ids) == most
    request, _ = both(engine, PROMPTS[4], replace(GREEDY, max_tokens=999, logit_bias=((3, 100.0),)))
    assert request.finish_reason == "context"


def test_a_stop_id_ends_it_where_it_comes(engine: Engine) -> None:
    def odd(made: Sequence[int]) -> Tensor:
        allowed = torch.zeros(engine.model.config.vocab_size, dtype=torch.bool)
        allowed[[3, 4, 5][len(made) % 3]] = True
        return allowed

    request, ids = both(engine, [3, 4, 5] * 8, replace(GREEDY, stop_ids=frozenset({5})), mask=odd)
    assert ids == [3, 4, 5] and request.finish_reason == "stop"
    request, ids = both(engine, [3, 4, 5] * 8, GREEDY, mask=odd)
    assert ids == ([3, 4, 5] * 14)[:40] and request.accepted > 25


def test_what_on_token_decides_is_in_time(engine: Engine) -> None:
    """It forces an id after the third, and ends the answer at the ninth."""

    def run(gauge: Gauge | None) -> tuple[list[int], list[int]]:
        seen: list[int] = []

        def note(token: int) -> None:
            seen.append(token)
            if len(seen) == 3:
                request.forced.append(11)
            if len(seen) == 9:
                request.finish_reason = "stop"

        request = Request([7] * 20, replace(GREEDY, logit_bias=((7, 100.0),)), on_token=note)
        return answer(engine, request, gauge)[0], seen

    assert run(Eager()) == run(None) == ([7, 7, 7, 11, 7, 7, 7, 7, 7],) * 2


def test_a_broken_row_ahead_hurts_only_who_gets_there(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = answer(engine, Request(RANDOM, GREEDY), None)
    monkeypatch.setattr(Drafter, "draft", lambda drafter, ids: [299] * MOST)
    forward = engine.model.forward

    def broken(*step: object) -> Tensor:
        h = forward(*step).clone()  # type: ignore[arg-type]
        if len(h) == ROWS:
            h[1:] = torch.nan
        return h

    monkeypatch.setattr(engine.model, "forward", broken)
    assert 299 not in expected
    assert answer(engine, Request(RANDOM, GREEDY), Eager())[0] == expected
    biased = replace(GREEDY, logit_bias=((299, 1000.0),))
    with pytest.raises(KimiError, match="not numbers"):
        answer(engine, Request(RANDOM, biased), Eager())


@pytest.mark.parametrize("right", [0, 1, 2])
def test_rows_of_wrong_guesses_are_never_found(engine: Engine, monkeypatch: pytest.MonkeyPatch, right: int) -> None:
    """Neither by a request that goes on from the answer nor by one that goes on as was guessed."""
    expected, _ = answer(engine, Request(RANDOM, GREEDY), None)
    whole = RANDOM + expected

    def half_right(drafter: Drafter, ids: Sequence[int]) -> list[int]:
        return [*whole[len(ids) : len(ids) + right], *[299] * MOST][:MOST]

    monkeypatch.setattr(Drafter, "draft", half_right)
    ids, request = answer(engine, Request(RANDOM, GREEDY), Eager())
    assert ids == expected and request.accepted < request.drafted
    monkeypatch.undo()
    engine.gauge = None
    assert engine.tokens == whole[:-1]
    for prompt in (whole, [*whole[:-5], 299, 299, 299, 4], [*RANDOM, 299, 299, 299]):
        found = Request(prompt, replace(GREEDY, max_tokens=3, logprobs=20))
        list(engine.stream(found))
        assert found.cached_tokens >= len(RANDOM) // PAGE_SIZE * PAGE_SIZE
        fresh = answer(engine, Request(prompt, found.params), None)[1]
        values = [[value for _, value in each.top] for each in (*found.logprobs, *fresh.logprobs)]
        assert torch.tensor(values[:3]).allclose(torch.tensor(values[3:]), atol=1e-3)
        answer(engine, Request(RANDOM, GREEDY), None)


LENGTHS = st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(1, 60)), min_size=1, max_size=5)


@settings(max_examples=12)
@given(LENGTHS, st.integers(1, 4), st.integers(3, 10))
def test_many_in_little_room(engine: Engine, asked: list[tuple[list[int], int]], batch: int, pages: int) -> None:
    """Drafts take nobody's pages: as many make room as without them, and every page comes back."""
    requests = [(prompt, replace(GREEDY, max_tokens=most)) for prompt, most in asked]
    expected = [answer(engine, Request(list(prompt), params), None)[0] for prompt, params in requests]
    engine.forget()
    taken: list[int] = []
    engine.kv.extend(taken, (engine.kv.num_pages - pages) * PAGE_SIZE)
    try:
        engine.gauge = Eager()
        made = dict(engine.stream_many([Request(list(prompt), params) for prompt, params in requests], batch))
        assert [made[number] for number in range(len(requests))] == expected
        held = engine.cache.pages
        assert all(engine.kv.holders[page] == 1 for page in held)
        assert sorted(engine.kv.free + held + taken) == list(range(engine.kv.num_pages))
    finally:
        engine.kv.release(taken)


def test_a_page_is_not_taken_from_what_is_cached(engine: Engine) -> None:
    engine.forget()
    engine.gauge = Eager()
    scheduler = engine.scheduler(1)
    each = scheduler.add(Request([3] * (PAGE_SIZE - 2), replace(GREEDY, logit_bias=((3, 100.0),))))
    scheduler.step()
    taken: list[int] = []
    engine.kv.extend(taken, len(engine.kv.free) * PAGE_SIZE)
    while each.done < PAGE_SIZE:
        before = each.done
        scheduler.step()
        assert each.done == before + 1 and len(each.pages) == 1
    engine.kv.release(taken)
    scheduler.step()
    assert each.done == PAGE_SIZE + ROWS
    scheduler.close()


def test_the_budget_of_reasoning_and_stop_strings(kimi: Kimi, engine: Engine) -> None:
    """Through `Reply`, with its figures."""

    def run(gauge: Gauge | None) -> tuple[Message, str, Stats]:
        engine.forget()
        engine.gauge = gauge
        params = replace(kimi.default_params(True), temperature=0.0, max_tokens=60, stop=("zz",), seed=1)
        reply = kimi.reply([Message("user", "a a a a a a a a")], params, thinking=True, think_budget=12)
        list(reply)
        return reply.message, reply.finish_reason, reply.stats

    message, why, stats = run(None)
    ahead, its_why, its_stats = run(Eager())
    assert (ahead, its_why) == (message, why)
    assert (its_stats.thinking_tokens, its_stats.answer_tokens) == (stats.thinking_tokens, stats.answer_tokens)
    assert stats.drafted == 0 and 0 <= its_stats.accepted <= its_stats.drafted > 0


def test_the_gauge_is_asked_about_real_steps(engine: Engine) -> None:
    ids, _ = answer(engine, Request(PROMPTS[0], GREEDY), None)
    gauge = Gauge()
    assert answer(engine, Request(PROMPTS[0], GREEDY), gauge)[0] == ids
    assert len(gauge._seconds[1, 1]) >= ENOUGH
