"""Little room and beginnings in common: whoever shares, makes room, fails or leaves, nobody else's answer changes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid import Kimi, SamplingParams
from hybrid.engine.engine import Engine
from hybrid.engine.request import Request
from hybrid.engine.scheduler import Scheduler
from hybrid.engine.sequence import Sequence as Running
from hybrid.errors import KimiError

COUNT = 64
PAGES = 7
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def prompts() -> list[list[int]]:
    """A third begins with the same page and a half."""
    draw = torch.Generator().manual_seed(5)
    common = torch.randint(3, 300, (96,), generator=draw).tolist()
    lengths = torch.randint(1, 80, (COUNT,), generator=draw).tolist()
    own = [torch.randint(3, 300, (length,), generator=draw).tolist() for length in lengths]
    return [common * (number % 3 == 0) + ids for number, ids in enumerate(own)]


PROMPTS = prompts()
PARAMS = [replace(GREEDY, max_tokens=1 + 11 * number % 23) for number in range(COUNT)]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Engine]:
    """Exact experts: rounding to int8 turns the last bits, which depend on the batch, into visible ones at times."""
    with Kimi.load(
        tiny, dtype="float32", activations="float32", ctx=256, cache=PAGES * 64, threads=1, prefill_chunk=64
    ) as kimi:
        yield kimi._engine


def alone(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    engine.forget()
    return list(engine.stream(Request(list(prompt), params)))


def accounted(engine: Engine) -> bool:
    """Whether every page is free, or held by the prefix cache and nobody else."""
    pages = engine.cache.pages
    once = all(engine.kv.holders[page] == 1 for page in pages)
    return once and sorted(engine.kv.free + pages) == list(range(engine.kv.num_pages))


def finish(scheduler: Scheduler) -> list[Running]:
    ended = []
    while scheduler.running or scheduler.waiting:
        ended += scheduler.step()
    return ended


def test_sixty_four_at_once_in_little_room(engine: Engine) -> None:
    expected = [alone(engine, *pair) for pair in zip(PROMPTS, PARAMS, strict=True)]
    engine.forget()
    scheduler = engine.scheduler(8)
    added = [scheduler.add(Request(ids, params)) for ids, params in zip(PROMPTS, PARAMS, strict=True)]
    assert len(finish(scheduler)) == COUNT and scheduler.preemptions > 0
    assert [each.answer for each in added] == expected
    assert sum(each.request.cached_tokens for each in added) > 64 * 10
    assert accounted(engine)


def test_who_made_room_draws_on_as_if_nothing_had_been(engine: Engine) -> None:
    """Penalties, scores, progress and the generator's state outlast it."""
    params = [
        replace(GREEDY, temperature=1.3, top_p=1.0, seed=n, max_tokens=70, frequency_penalty=0.5, logprobs=1)
        for n in range(4)
    ]
    expected = [alone(engine, PROMPTS[1], each) for each in params]
    engine.forget()
    scheduler = engine.scheduler(4)
    seen: list[tuple[int, int]] = []
    requests = [Request(PROMPTS[1], each, on_prefill=lambda *done: seen.append(done)) for each in params]
    added = [scheduler.add(request) for request in requests]
    finish(scheduler)
    assert scheduler.preemptions and [each.answer for each in added] == expected
    for request, answer in zip(requests, expected, strict=True):
        assert [each.token for each in request.logprobs] == answer
    assert all(0 <= done <= total == len(PROMPTS[1]) for done, total in seen)


TURNS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 130), st.integers(0, 2), st.integers(1, 20)), min_size=1, max_size=6
)


@settings(max_examples=8)
@given(TURNS, st.integers(1, 4))
def test_what_is_found_in_the_cache_changes_nothing(
    engine: Engine, turns: list[tuple[int, int, int, int]], batch: int
) -> None:
    asked = [
        ([*PROMPTS[3 * number][:length], *range(5, 5 + more)], replace(GREEDY, max_tokens=most))
        for number, length, more, most in turns
    ]
    expected = [alone(engine, *each) for each in asked]
    engine.forget()
    for _ in range(2):  # the second time with all of it in the cache, as far as there was room
        made = dict(engine.stream_many([Request(*each) for each in asked], batch))
        assert [made[number] for number in range(len(asked))] == expected
        assert accounted(engine)


def test_two_that_part_within_a_page_leave_each_others_rows(engine: Engine) -> None:
    common = PROMPTS[0][:90]
    asked = [[*common, 7, 8], [*common, 9], [*common, 7, 11, 12]]
    expected = [alone(engine, ids, GREEDY) for ids in asked]
    alone(engine, common, replace(GREEDY, max_tokens=1))
    scheduler = engine.scheduler(3)
    added = [scheduler.add(Request(ids, GREEDY)) for ids in asked]
    scheduler.step()
    first, *others = added
    assert [each.request.cached_tokens for each in added] == [90, 64, 64]  # the first took the half page over
    assert all(each.pages[0] == first.pages[0] and each.pages[1] != first.pages[1] for each in others)
    before = engine.kv.read(1, tuple(first.pages), first.done).clone()
    scheduler.step()
    assert torch.equal(engine.kv.read(1, tuple(first.pages), len(before)), before)
    finish(scheduler)
    assert [each.answer for each in added] == expected


class Broken:
    """A head that gives no numbers for one row of a batch, from some step on."""

    def __init__(self, engine: Engine, row: int, after: int) -> None:
        self.head, self.row, self.after = engine.model.head, row, after

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        logits = self.head(h).clone()
        self.after -= 1
        if self.after < 0 and self.row < len(logits):
            logits[self.row] = torch.nan
        return logits


def test_one_that_fails_does_not_hurt_the_other(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [alone(engine, ids, GREEDY) for ids in (PROMPTS[0], PROMPTS[3])]
    known = PROMPTS[0][:40]
    alone(engine, known, replace(GREEDY, max_tokens=1))
    scheduler = engine.scheduler(2)
    good, bad = (scheduler.add(Request(ids, GREEDY)) for ids in (PROMPTS[3], PROMPTS[0]))
    monkeypatch.setattr(engine.model, "head", Broken(engine, 1, after=3))
    ended = finish(scheduler)
    monkeypatch.undo()
    assert ended == [bad, good] and bad.answer == expected[0][: len(bad.answer)]
    assert isinstance(bad.error, KimiError) and "not numbers" in str(bad.error)
    assert good.error is None and good.answer == expected[1]
    assert accounted(engine)
    assert list(engine.stream(Request(PROMPTS[0], GREEDY))) == expected[0]


def test_rows_that_are_no_numbers_are_not_found_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a prompt, where no logits would tell."""
    expected = alone(engine, PROMPTS[0], GREEDY)
    engine.forget()
    forward = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda *step: forward(*step) * torch.nan)
    engine.prefill_chunk = 32
    request = Request(PROMPTS[0], GREEDY)
    with pytest.raises(KimiError, match="not numbers"):
        list(engine.stream(request))
    monkeypatch.undo()
    engine.prefill_chunk = 64
    assert not engine.cache.pages and accounted(engine)
    assert list(engine.stream(Request(PROMPTS[0], GREEDY))) == expected


def test_a_broken_step_ends_all_that_took_part(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*step: object) -> torch.Tensor:
        raise KimiError("The drive failed.", "Replace it.")

    engine.forget()
    scheduler = engine.scheduler(2)
    added = [scheduler.add(Request(ids[:20], GREEDY)) for ids in PROMPTS[:3]]
    scheduler.step()
    monkeypatch.setattr(engine.model, "forward", broken)
    assert scheduler.step() == added[:2] and all(each.error is not None for each in added[:2])
    monkeypatch.undo()
    assert finish(scheduler) == added[2:] and added[2].error is None and accounted(engine)


def test_a_mask_that_allows_nothing_ends_the_request(engine: Engine) -> None:
    engine.forget()
    nothing = torch.zeros(engine.model.config.vocab_size, dtype=torch.bool)
    with pytest.raises(KimiError, match="allowed"):
        list(engine.stream(Request(PROMPTS[0], GREEDY, mask=lambda made: nothing)))
    assert accounted(engine)
