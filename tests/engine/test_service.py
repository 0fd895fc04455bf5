"""Many threads ask, one computes: everybody gets what they would get alone."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrid import Kimi, SamplingParams
from hybrid.chat.message import Message
from hybrid.engine.engine import Engine
from hybrid.engine.request import Request
from hybrid.engine.service import Service
from hybrid.errors import ContextExceeded, KimiError, UsageError

GREEDY = SamplingParams(temperature=0, max_tokens=12)
LONG = replace(GREEDY, max_tokens=3000)
PROMPTS = [list(range(first, first + 20 + 9 * first)) for first in range(3, 9)]
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Engine]:
    with Kimi.load(tiny, dtype="float32", activations="float32", ctx=4096, threads=1, prefill_chunk=32) as kimi:
        yield kimi._engine


@pytest.fixture
def service(engine: Engine) -> Iterator[Service]:
    service = Service(engine, batch=3)
    yield service
    service.close()
    pages = engine.cache.pages
    assert all(engine.kv.holders[page] == 1 for page in pages)
    assert sorted(engine.kv.free + pages) == list(range(engine.kv.num_pages))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_threads_get_what_they_would_get_alone(engine: Engine) -> None:
    params = [replace(GREEDY, temperature=float(n % 2), seed=n) for n in range(len(PROMPTS))]
    requests = [Request(*pair) for pair in zip(PROMPTS, params, strict=True)]
    expected = [list(engine.stream(Request(*pair))) for pair in zip(PROMPTS, params, strict=True)]
    service = Service(engine, batch=3)
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        assert list(threads.map(lambda request: list(service.stream(request)), requests)) == expected
    service.close()
    assert all(request.finish_reason == "length" for request in requests)


def test_one_of_two_is_cancelled(engine: Engine, service: Service) -> None:
    leaving, staying = Request(PROMPTS[0], LONG), Request(PROMPTS[1], replace(GREEDY, max_tokens=60))
    first, second = service.stream(leaving), service.stream(staying)
    made = [next(first), next(first)]
    leaving.cancelled = True
    made += list(first)
    assert leaving.finish_reason == "interrupted" and len(made) < 3000
    assert len(list(second)) == 60 and staying.finish_reason == "length"


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_who_stops_listening_cancels(service: Service, leave: str) -> None:
    request = Request(PROMPTS[0], LONG)
    answer = service.stream(request)
    next(answer)
    if leave == "close":
        answer.close()
        assert list(answer) == []
    del answer
    until(lambda: request.finish_reason == "interrupted" and service.running == service.waiting == 0)


def test_as_many_run_as_may_and_the_others_wait(service: Service) -> None:
    requests = [Request(PROMPTS[0], LONG) for _ in range(20)]
    answers = [service.stream(request) for request in requests]
    until(lambda: (service.running, service.waiting) == (3, 17))
    for answer in answers:
        answer.close()
    until(lambda: service.waiting == service.running == 0)
    assert len(list(service.stream(Request(PROMPTS[1], GREEDY)))) == 12


def test_an_error_is_raised_where_it_belongs(service: Service) -> None:
    def refuse(made: object) -> torch.Tensor:
        raise KimiError("This cannot be said.")

    bad, good = service.stream(Request(PROMPTS[0], GREEDY, mask=refuse)), service.stream(Request(PROMPTS[1], GREEDY))
    assert len(list(good)) == 12
    with pytest.raises(KimiError, match="cannot be said"):
        list(bad)
    assert list(bad) == []
    with pytest.raises(ContextExceeded):
        service.stream(Request([3] * 4096, GREEDY))


def test_closing_ends_what_runs_and_what_waits(engine: Engine) -> None:
    service = Service(engine, batch=1)
    requests = [Request(PROMPTS[n], LONG) for n in range(3)]
    answers = [service.stream(request) for request in requests]
    assert next(answers[0]) >= 0
    service.close()
    assert len(list(answers[0])) < 2999 and [list(answer) for answer in answers[1:]] == [[], []]
    assert {request.finish_reason for request in requests} == {"interrupted"}
    for refused in (lambda: service.stream(Request([3], GREEDY)), lambda: service.call(int)):
        with pytest.raises(KimiError, match="closed"):
            refused()
    service.close()  # once more changes nothing


def test_calls_come_between_steps(engine: Engine, service: Service) -> None:
    """What runs pauses for it, and goes on."""
    expected = service.call(lambda: engine.logits(PROMPTS[0]))
    request = Request(PROMPTS[1], replace(GREEDY, max_tokens=80))
    answer = service.stream(request)
    made = [next(answer)]
    assert torch.allclose(service.call(lambda: engine.logits(PROMPTS[0])), expected, atol=1e-4)
    made += list(answer)
    assert len(made) == 80
    assert service.call(threading.current_thread) is service._thread
    with pytest.raises(ZeroDivisionError):
        service.call(lambda: 1 // 0)


def test_a_bug_is_heard_of_by_all(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(engine, batch=2)
    answers = [service.stream(Request(PROMPTS[n], LONG)) for n in range(3)]
    next(answers[0])
    monkeypatch.setattr(engine.model, "head", None)
    for answer in answers:
        with pytest.raises(TypeError):
            list(answer)
    service.close()


def test_a_shared_kimi_answers_threads(tiny: Path) -> None:
    asked = [[Message("user", f"hello number {n}")] for n in range(5)]
    with Kimi.load(tiny, dtype="float32", activations="float32", ctx=256, cache=1024, threads=1) as kimi:
        params = replace(kimi.default_params(True), temperature=0, max_tokens=40)

        def ask(messages: list[Message]) -> tuple[str | None, str, int]:
            reply = kimi.reply(messages, params, thinking=True, think_budget=5)
            assert list(reply)
            return reply.message.reasoning_content, reply.message.content, reply.stats.thinking_tokens

        expected = [ask(messages) for messages in asked]
        assert all(tokens == 6 for *_, tokens in expected)
        logits = kimi.logits([3, 4, 5])
        kimi.share(batch=3)
        with ThreadPoolExecutor(len(asked)) as threads:
            assert list(threads.map(ask, asked)) == expected
        assert torch.allclose(kimi.logits([3, 4, 5]), logits, atol=1e-4)
        with pytest.raises(UsageError, match="generate_many"):
            kimi.generate_many([[3]], params)
        dropped = kimi.reply(asked[0], replace(params, max_tokens=200))
        next(dropped)
        request = dropped._request
        del dropped
        gc.collect()
        until(lambda: request.finish_reason == "interrupted")
        left = kimi.generate([3, 4, 5], replace(params, max_tokens=200))
        next(left)
    assert len(list(left)) < 200
