"""Prefill = decode, cached = uncached, cancelled = nothing happened."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid import Kimi, SamplingParams
from hybrid.engine.engine import Engine, common_prefix
from hybrid.engine.request import Request
from hybrid.errors import ContextExceeded

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPT = list(range(3, 90))


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Engine]:
    with Kimi.load(tiny, dtype="float32", activations="float32", ctx=256) as kimi:
        yield kimi._engine


def run(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY) -> tuple[list[int], Request]:
    request = Request(list(prompt), params)
    return list(engine.stream(request)), request


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_prefill_in_chunks_equals_one_by_one(engine: Engine, chunk: int) -> None:
    engine.prefill_chunk = 1
    one_by_one = engine.logits(PROMPT)
    engine.prefill_chunk = chunk
    difference = engine.logits(PROMPT) - one_by_one
    assert difference.norm() < 1e-5 * one_by_one.norm()
    engine.prefill_chunk = 256


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9, 90])
@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_kernels_for_few_tokens_agree_with_the_path_for_many(tiny: Path, length: int, chunk: int) -> None:
    """bf16 as on disk: up to four tokens go through our own products, more through torch's; both round to bf16."""
    with Kimi.load(tiny, ctx=256, activations="float32") as kimi:
        engine, ids = kimi._engine, list(range(3, 3 + length))
        engine.prefill_chunk = 256
        many = engine.logits([*ids, *range(100, 110)])[:length]
        engine.prefill_chunk = chunk
        assert (engine.logits(ids) - many).norm() < 0.05 * many.norm()


def test_decoding_continues_as_prefilling_would(engine: Engine) -> None:
    answer, _ = run(engine, PROMPT)
    logits = engine.logits(PROMPT + answer)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == answer


def test_a_cached_prefix_changes_nothing(engine: Engine) -> None:
    engine._keep(0)
    fresh, first = run(engine, PROMPT)
    assert first.cached_tokens == 0
    again, second = run(engine, PROMPT)
    assert again == fresh and second.cached_tokens == len(PROMPT) - 1
    forked = [*PROMPT[:40], 5, 6, 7]
    cached, third = run(engine, forked)
    assert third.cached_tokens == 40
    engine._keep(0)
    assert run(engine, forked)[0] == cached


def test_a_longer_conversation_computes_only_what_is_new(engine: Engine) -> None:
    answer, _ = run(engine, PROMPT)
    _, request = run(engine, [*PROMPT, *answer, 9, 10])
    assert request.cached_tokens == len(PROMPT) + len(answer) - 1  # the last token was yielded, never computed


def test_cancelling_in_prefill_leaves_a_usable_cache(engine: Engine) -> None:
    engine._keep(0)
    expected, _ = run(engine, PROMPT)
    engine._keep(0)
    engine.prefill_chunk = 32

    def cancel(done: int, total: int) -> None:
        assert total == len(PROMPT)
        request.cancelled = done > 40

    request = Request(PROMPT, GREEDY, on_prefill=cancel)
    assert list(engine.stream(request)) == []
    assert request.finish_reason == "interrupted"
    assert len(engine.tokens) == 32  # the chunk that was cut short left nothing behind
    assert run(engine, PROMPT)[0] == expected
    engine.prefill_chunk = 256


def test_cancelling_while_decoding_stops_after_that_token(engine: Engine) -> None:
    request = Request(PROMPT, GREEDY)
    answer = []
    for token in engine.stream(request):
        answer.append(token)
        request.cancelled = len(answer) == 4
    assert len(answer) == 4 and request.finish_reason == "interrupted"


def test_forced_tokens_come_first(engine: Engine) -> None:
    request = Request(PROMPT, GREEDY)
    request.forced.extend([7, 8])
    answer = list(engine.stream(request))
    assert answer[:2] == [7, 8]
    assert answer[2:] == run(engine, [*PROMPT, 7, 8])[0][:10]


def test_stop_ids_end_the_answer(engine: Engine) -> None:
    answer, _ = run(engine, PROMPT)
    stopping = SamplingParams(temperature=0, max_tokens=12, stop_ids=frozenset({answer[3]}))
    stopped, request = run(engine, PROMPT, stopping)
    assert stopped == answer[: answer.index(answer[3]) + 1] and request.finish_reason == "stop"


def test_limits_have_names(engine: Engine) -> None:
    assert run(engine, PROMPT)[1].finish_reason == "length"
    long = SamplingParams(temperature=0, max_tokens=10_000)
    answer, request = run(engine, PROMPT, long)
    assert request.finish_reason == "context"
    assert len(PROMPT) + len(answer) == engine.kv.capacity + 1  # the last one needs no room: nothing follows it


def test_a_prompt_that_does_not_fit_is_refused_before_any_work(engine: Engine) -> None:
    before = list(engine.tokens)
    with pytest.raises(ContextExceeded, match=r"257.*256"):
        engine.stream(Request([3] * 256, GREEDY))
    assert engine.tokens == before


def test_pages_are_conserved(engine: Engine) -> None:
    for length in (1, 64, 65, 200, 3):
        run(engine, PROMPT[:1] * length)
        assert sorted(engine.kv.free + engine.page_table) == list(range(engine.kv.num_pages))


def test_common_prefix() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([1, 2, 3], [1, 5, 3]) == 1
