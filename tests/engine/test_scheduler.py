"""Many at once = one after the other, whatever the batch, the chunk and the room; and every page comes back."""

from collections import Counter
from collections.abc import Callable, Iterator
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
from hybrid.errors import ContextExceeded, KimiError, UsageError
from hybrid.memory.kv_cache import PAGE_SIZE

COUNT = 20
GREEDY = SamplingParams(temperature=0, stop_ids=frozenset({5}))
DRAWN = SamplingParams(temperature=1.5, top_p=1.0, max_tokens=10)


def prompts() -> list[list[int]]:
    """Lengths from 1 to 130 tokens, pages of 64 among them."""
    draw = torch.Generator().manual_seed(3)
    lengths = [1, 2, 63, 64, 65, 128, 130, *torch.randint(1, 100, (COUNT - 7,), generator=draw).tolist()]
    return [torch.randint(3, 300, (length,), generator=draw).tolist() for length in lengths]


PROMPTS = prompts()
PARAMS = [replace(GREEDY, max_tokens=1 + 7 * index % 18) for index in range(COUNT)]


@pytest.fixture(scope="module")
def kimi(tiny: Path) -> Iterator[Kimi]:
    with Kimi.load(tiny, dtype="float32", ctx=192, cache=1024, threads=1) as kimi:
        yield kimi


@pytest.fixture(scope="module")
def engine(kimi: Kimi) -> Iterator[Engine]:
    yield kimi._engine
    kimi._engine.prefill_chunk = 256


@pytest.fixture(scope="module")
def one_by_one(kimi: Kimi) -> list[list[int]]:
    return [list(kimi.generate(*pair)) for pair in zip(PROMPTS, PARAMS, strict=True)]


def all_free(engine: Engine) -> bool:
    """Whether every page is free or held by the prefix cache alone."""
    pages = engine.cache.pages
    alone = all(engine.kv.holders[page] == 1 for page in pages)
    return alone and sorted(engine.kv.free + pages) == list(range(engine.kv.num_pages))


@pytest.fixture
def small(kimi: Kimi, engine: Engine) -> Iterator[None]:
    """Leave only as many pages as the longest sequence takes."""
    engine.forget()
    taken: list[int] = []
    engine.kv.extend(taken, (engine.kv.num_pages - 3) * PAGE_SIZE)
    yield
    engine.kv.release(taken)


def finish(kimi: Kimi, batch: int) -> dict[int, tuple[list[int], str]]:
    return {index: (ids, why) for index, ids, why in kimi.generate_many(PROMPTS, PARAMS, batch=batch)}


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_many_equal_one_by_one(kimi: Kimi, engine: Engine, one_by_one: list[list[int]], batch: int, chunk: int) -> None:
    engine.prefill_chunk = chunk
    found = finish(kimi, batch)
    assert [found[index][0] for index in range(COUNT)] == one_by_one
    for index, (ids, why) in found.items():
        assert why == ("stop" if ids[-1] in GREEDY.stop_ids else "length")
        assert why == "stop" or len(ids) == PARAMS[index].max_tokens
    assert all_free(engine)


def test_what_does_not_fit_beside_the_others_waits(
    kimi: Kimi, engine: Engine, one_by_one: list[list[int]], small: None
) -> None:
    engine.prefill_chunk = 64
    found = finish(kimi, 8)
    assert [found[index][0] for index in range(COUNT)] == one_by_one
    assert len(engine.kv.free + engine.cache.pages) == 3


def test_answers_come_as_they_end(kimi: Kimi) -> None:
    lengths = [9, 1, 5]
    params = [SamplingParams(temperature=0, max_tokens=length) for length in lengths]
    assert [index for index, _, _ in kimi.generate_many(PROMPTS[:1] * 3, params)] == [1, 2, 0]


def test_a_seed_gives_the_same_whatever_else_is_made(tiny: Path) -> None:
    """Exact experts: rounding to int8 turns the last bits, which depend on the batch, into visible ones at times."""
    params = [replace(DRAWN, seed=index) for index in range(COUNT)]
    with Kimi.load(tiny, dtype="float32", activations="float32", ctx=192, cache=1024, threads=1) as kimi:
        alone = [list(kimi.generate(*pair)) for pair in zip(PROMPTS, params, strict=True)]
        assert len({tuple(ids) for ids in alone}) == COUNT
        for order in (range(COUNT), range(COUNT - 1, 3, -2)):
            chosen = list(order)
            made = kimi.generate_many([PROMPTS[i] for i in chosen], [params[i] for i in chosen], batch=5)
            assert {chosen[index]: ids for index, ids, _ in made} == {i: alone[i] for i in chosen}


def test_the_context_ends_an_answer_as_it_does_alone(kimi: Kimi) -> None:
    params = SamplingParams(temperature=0, max_tokens=10_000)
    [(_, ids, why)] = kimi.generate_many([PROMPTS[6]], params)
    assert why == "context" and len(PROMPTS[6]) + len(ids) == kimi.ctx + 1
    assert ids == list(kimi.generate(PROMPTS[6], params))


def test_a_prompt_that_never_fits_is_refused_before_any_work(kimi: Kimi, engine: Engine) -> None:
    steps = engine.model.steps
    with pytest.raises(ContextExceeded, match=r"193.*192"):
        kimi.generate_many([PROMPTS[0], [3] * 192], GREEDY)
    assert engine.model.steps == steps


def test_a_batch_of_none_is_refused(kimi: Kimi) -> None:
    with pytest.raises(UsageError, match="batch of 0"):
        kimi.generate_many(PROMPTS, GREEDY, batch=0)


def test_leaving_early_gives_the_pages_back(kimi: Kimi, engine: Engine) -> None:
    for _ in kimi.generate_many(PROMPTS, PARAMS, batch=4):
        assert len(engine.kv.free) < engine.kv.num_pages
        break
    assert all_free(engine)


def test_an_error_gives_the_pages_back(kimi: Kimi, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    head = engine.model.head
    monkeypatch.setattr(engine.model, "head", lambda h: head(h) if engine.model.steps % 4 else head(h) * torch.nan)
    with pytest.raises(KimiError, match="not numbers"):
        finish(kimi, 4)
    assert all_free(engine)


# -- step by step -----------------------------------------------------------------------------------------------------
@pytest.fixture
def start(engine: Engine) -> Callable[..., Scheduler]:
    engine.forget()

    def make(**settings: int) -> Scheduler:
        engine.forget()
        chosen = {"ctx": engine.ctx, "batch": 8, "prefill_chunk": 64} | settings
        return Scheduler(engine.model, engine.cache, **chosen)

    return make


def test_prompts_share_a_chunk_and_answers_go_on_beside_them(start: Callable[..., Scheduler]) -> None:
    scheduler = start(prefill_chunk=10)
    params = SamplingParams(temperature=0, max_tokens=3)
    a, b, c = (scheduler.add(Request(list(range(3, 3 + length)), params)) for length in (8, 7, 9))
    done = []
    while scheduler.running or scheduler.waiting:
        scheduler.step()
        done.append((a.done, b.done, c.done))
    assert done == [(8, 2, 0), (9, 7, 5), (10, 8, 9), (10, 9, 10), (10, 9, 11)]
    assert [len(each.answer) for each in (a, b, c)] == [3, 3, 3]


def test_waiting_is_in_order(start: Callable[..., Scheduler], small: None) -> None:
    """A short request does not overtake a long one, which might then wait for ever."""
    scheduler = start()
    long, longer, short = (
        scheduler.add(Request([3] * length, replace(GREEDY, max_tokens=4))) for length in (90, 90, 9)
    )
    scheduler.step()
    assert scheduler.running == [long] and list(scheduler.waiting) == [longer, short]
    scheduler.close()


def test_one_of_many_is_cancelled(engine: Engine, start: Callable[..., Scheduler], one_by_one: list[list[int]]) -> None:
    """Waiting, in its prompt, or in its answer: it ends without its neighbours noticing."""
    scheduler = start(batch=3, prefill_chunk=16)
    added = [scheduler.add(Request(ids, params)) for ids, params in zip(PROMPTS, PARAMS, strict=True)]
    ended = scheduler.step()
    answering, reading, waiting = added[1], added[2], added[-1]
    assert answering.answer and reading.is_prompt and waiting in scheduler.waiting
    for each in (answering, reading, waiting):
        each.request.cancelled = True
    while scheduler.running or scheduler.waiting:
        ended += scheduler.step()
    assert sorted(map(id, ended)) == sorted(map(id, added))
    for index, each in enumerate(added):
        if each.request.cancelled:
            assert each.request.finish_reason == "interrupted"
            assert each.answer == one_by_one[index][: len(each.answer)]
        else:
            assert each.answer == one_by_one[index]
    assert all_free(engine)


def test_cancelling_all_abandons_the_step_between_layers(engine: Engine, start: Callable[..., Scheduler]) -> None:
    scheduler = start(prefill_chunk=8)
    requests = [Request(ids, GREEDY) for ids in PROMPTS[2:5]]

    def cancel(done: int, total: int) -> None:
        for each in requests:
            each.cancelled = done == 8

    requests[0].on_prefill = cancel
    first, *_ = [scheduler.add(request) for request in requests]
    assert scheduler.step() == [] and first.done == 8
    assert len(scheduler.step()) == 3 and first.done == 8
    assert all(request.finish_reason == "interrupted" for request in requests) and all_free(engine)


def test_cancelled_in_the_middle_of_a_step(engine: Engine, start: Callable[..., Scheduler]) -> None:
    scheduler = start()
    sequence = scheduler.add(Request(PROMPTS[5], GREEDY))
    block = engine.model.blocks[1]
    attend = block.attend

    def cancel(*arguments: object) -> torch.Tensor:
        sequence.request.cancelled = True
        return attend(*arguments)  # type: ignore[arg-type]

    object.__setattr__(block, "attend", cancel)
    try:
        assert scheduler.step() == [sequence]
    finally:
        object.__delattr__(block, "attend")
    assert sequence.done == 0 and sequence.answer == [] and all_free(engine)


def test_forced_tokens_come_first(start: Callable[..., Scheduler]) -> None:
    scheduler = start()
    sequence = scheduler.add(Request(PROMPTS[0], replace(GREEDY, max_tokens=3)))
    sequence.request.forced.extend([7, 8])
    while scheduler.running or scheduler.waiting:
        scheduler.step()
    assert sequence.answer[:2] == [7, 8] and len(sequence.answer) == 3


LENGTHS = st.lists(st.tuples(st.integers(1, 150), st.integers(1, 40)), min_size=1, max_size=8)


@settings(max_examples=25)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 70), st.data())
def test_pages_are_conserved(
    engine: Engine, lengths: list[tuple[int, int]], batch: int, chunk: int, data: st.DataObject
) -> None:
    """Whoever comes and whoever leaves: no page is lost or lent twice, and each holds enough."""
    engine.forget()
    scheduler = Scheduler(engine.model, engine.cache, ctx=engine.ctx, batch=batch, prefill_chunk=chunk)
    for length, most in lengths:
        scheduler.add(Request([3] * length, SamplingParams(temperature=0, max_tokens=most)))
    try:
        while scheduler.running or scheduler.waiting:
            victim = data.draw(st.integers(0, 200))
            if victim < len(scheduler.running):
                scheduler.running[victim].request.cancelled = True
            scheduler.step()
            held = Counter(page for each in scheduler.running for page in each.pages) + Counter(engine.cache.pages)
            assert held == Counter({page: count for page, count in enumerate(engine.kv.holders) if count})
            assert sorted([*engine.kv.free, *held]) == list(range(engine.kv.num_pages))
            assert all(
                each.done <= each.longest and each.done <= len(each.pages) * PAGE_SIZE for each in scheduler.running
            )
            assert len(scheduler.running) <= batch
    finally:
        scheduler.close()  # hypothesis may leave in the middle
    assert all_free(engine)
