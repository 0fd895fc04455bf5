"""Prefill = decode, cached = uncached, cancelled = nothing happened."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrid import Kimi, SamplingParams
from hybrid.engine.engine import Engine
from hybrid.engine.request import Request
from hybrid.errors import ContextExceeded, UsageError

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
    engine.forget()
    fresh, first = run(engine, PROMPT)
    assert first.cached_tokens == 0
    again, second = run(engine, PROMPT)
    assert again == fresh and second.cached_tokens == len(PROMPT) - 1
    forked = [*PROMPT[:40], 5, 6, 7]
    cached, third = run(engine, forked)
    assert third.cached_tokens == 40
    engine.forget()
    assert run(engine, forked)[0] == cached


def test_a_longer_conversation_computes_only_what_is_new(engine: Engine) -> None:
    answer, _ = run(engine, PROMPT)
    _, request = run(engine, [*PROMPT, *answer, 9, 10])
    assert request.cached_tokens == len(PROMPT) + len(answer) - 1  # the last token was yielded, never computed


def test_cancelling_in_prefill_leaves_a_usable_cache(engine: Engine) -> None:
    engine.forget()
    expected, _ = run(engine, PROMPT)
    engine.forget()
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
        assert sorted(engine.kv.free + engine.cache.pages) == list(range(engine.kv.num_pages))


def test_ids_that_the_model_does_not_have_are_refused(engine: Engine) -> None:
    vocab = engine.model.config.vocab_size
    for prompt, params in (([vocab], GREEDY), ([3], SamplingParams(logit_bias=((vocab, 1.0),)))):
        with pytest.raises(UsageError, match="token"):
            engine.stream(Request(prompt, params))


def test_two_conversations_keep_their_rows(engine: Engine) -> None:
    engine.forget()
    first, second = [3, *PROMPT], [4, *PROMPT[:40]]
    for prompt in (first, second):
        run(engine, prompt)
    for prompt in (first, second):
        assert run(engine, prompt)[1].cached_tokens == len(prompt) - 1


def test_a_stream_that_is_left_alone_keeps_nothing_from_others(engine: Engine) -> None:
    """It pauses while another one is asked, and goes on as if nothing had been."""
    expected, _ = run(engine, PROMPT)
    paused = engine.stream(Request(PROMPT, GREEDY))
    answer = [next(paused), next(paused)]
    long = SamplingParams(temperature=0, max_tokens=10_000)
    assert run(engine, [9] * 250, long)[1].finish_reason == "context"
    assert sorted(engine.kv.free + engine.cache.pages) == list(range(engine.kv.num_pages))
    assert answer + list(paused) == expected


def test_scores_are_told_of_the_model_itself(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, logit_bias=((7, 1000.0),))
    answer, request = run(engine, PROMPT, params)
    expected = engine.logits(PROMPT + answer).log_softmax(-1)[len(PROMPT) - 1 : -1]
    assert answer == [7] * 4 and [each.token for each in request.logprobs] == answer
    for told, scores in zip(request.logprobs, expected, strict=True):
        values, ids = scores.topk(3)
        assert told.logprob == pytest.approx(float(scores[7]), abs=1e-4)
        assert [token for token, _ in told.top] == ids.tolist()
        assert [value for _, value in told.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_mask_says_what_may_come_next(engine: Engine) -> None:
    """It is asked before each token, with the answer so far."""
    allowed = [{8, 9}, {11}, None]

    def mask(made: Sequence[int]) -> torch.Tensor | None:
        ids = allowed[len(made)]
        return None if ids is None else torch.isin(torch.arange(engine.model.config.vocab_size), torch.tensor([*ids]))

    request = Request(PROMPT, replace(GREEDY, max_tokens=3), mask=mask)
    answer = list(engine.stream(request))
    assert answer[0] in {8, 9} and answer[1] == 11 and len(answer) == 3


def test_what_is_told_of_each_token_may_end_the_answer(engine: Engine) -> None:
    expected, _ = run(engine, PROMPT)
    seen: list[int] = []

    def note(token: int) -> None:
        seen.append(token)
        if len(seen) == 3:
            request.finish_reason = "stop"

    request = Request(PROMPT, GREEDY, on_token=note)
    assert list(engine.stream(request)) == seen == expected[:3]
