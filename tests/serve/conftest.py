"""A real server on a real tiny model, whose answers can be written in the question."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI

from hybrid.engine.request import Request
from hybrid.errors import KimiError
from hybrid.kimi import Kimi
from hybrid.progress import Progress
from hybrid.reply import Reply
from hybrid.serve.app import Settings
from hybrid.serve.server import Server, bind, url

CTX = 2048


SCRIPT = threading.local()  # what the request that this thread makes is to say


class ScriptedRequest(Request):
    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.forced.extend(getattr(SCRIPT, "ids", ()))


class ScriptedKimi(Kimi):
    """The model says what stands behind `say:` in the last message, control tokens by their names, then its own.

    `slow:` takes a third of a second over the prompt, `fail:` fails after the first token.
    """

    asked: list[list[int]]

    def reply(self, messages: Any, *arguments: Any, on_progress: Any = None, **more: Any) -> Reply:
        last = messages[-1].content
        SCRIPT.ids = self.tokenizer.encode_prompt(last.removeprefix("say:")) if last.startswith("say:") else []

        def report(progress: Progress) -> None:
            if last.startswith("slow:") and progress.done < progress.total:
                time.sleep(0.1)
            if on_progress is not None:
                on_progress(progress)

        try:
            reply = super().reply(messages, *arguments, on_progress=report, **more)
        finally:
            SCRIPT.ids = []
        self.asked.append(list(reply._request.prompt))
        if last.startswith("fail:"):
            reply._ids = _failing(reply._ids)
        return reply


def _failing(ids: Iterator[int]) -> Iterator[int]:
    yield next(ids)
    raise KimiError("The model produced values that are not numbers.", "Run doctor.")


@contextmanager
def serving(kimi: Kimi, **settings: Any) -> Iterator[str]:
    """The address of a server on a thread of its own."""
    ready = threading.Event()
    with bind("127.0.0.1", 0) as bound:
        address = url(bound)
        server = Server(kimi, Settings(**settings), ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            assert ready.wait(20)
            yield address
        finally:
            server.leave()
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def kimi(tiny: Path) -> Iterator[ScriptedKimi]:
    with pytest.MonkeyPatch.context() as patch, ScriptedKimi.load(tiny, ctx=CTX, cache=4 * CTX) as kimi:
        patch.setattr("hybrid.kimi.Request", ScriptedRequest)
        kimi.asked = []
        assert isinstance(kimi, ScriptedKimi)
        yield kimi


@pytest.fixture(scope="session")
def address(kimi: ScriptedKimi) -> Iterator[str]:
    with serving(kimi, keep_alive_s=0.05, body_limit=100_000) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=address, timeout=30) as client:
        yield client


@pytest.fixture
def openai(address: str) -> Iterator[OpenAI]:
    """OpenAI's own client; one that is left to the garbage collector leaves its connections open."""
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def gauge(client: httpx2.Client) -> Callable[[str], float]:
    """The value of a metric now."""

    def read(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"kimi_local:{name} "))

    return read


@pytest.fixture
def idle(gauge: Callable[[str], float]) -> Callable[[float], None]:
    """Wait at most so many seconds until nothing is being made."""

    def wait(seconds: float) -> None:
        end = time.monotonic() + seconds
        while gauge("requests_processing") + gauge("requests_deferred"):
            assert time.monotonic() < end, "still at work"
            time.sleep(0.02)

    return wait
