"""After a bug has ended the engine: who was being served hears of a failure, and whoever comes later of the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serve.conftest import CTX, ScriptedKimi, serving

MESSAGES = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hello", "max_tokens": 4},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4, "model": "any"},
}


@pytest.fixture(scope="module")
def broken(tiny: Path) -> Iterator[httpx2.Client]:
    """A server whose engine has met a bug in its first request."""

    def advance(scheduler: Any) -> None:
        raise IndexError("a bug")

    with ScriptedKimi.load(tiny, ctx=CTX) as own:
        own.asked = []
        own._engine.advance = advance  # type: ignore[method-assign]
        with serving(own) as address, httpx2.Client(base_url=address, timeout=30) as client:
            first = client.post("/v1/chat/completions", json=BODIES["/v1/chat/completions"])
            assert first.status_code == 500 and "a bug" not in first.text
            yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_later_requests_are_told(broken: httpx2.Client, path: str, stream: bool) -> None:
    told = broken.post(path, json=BODIES[path] | {"stream": stream})
    assert told.status_code == 503
    error = told.json()["error"]
    assert error["message"] == "An error has ended the engine. The server must be started again; its log says why."
    if path == "/v1/messages":
        assert told.json()["type"] == "error" and error["type"] == "api_error"
    else:
        assert (error["type"], error["code"], error["param"]) == ("server_error", "engine_closed", None)


def test_so_is_whoever_looks_after_the_server(broken: httpx2.Client) -> None:
    assert broken.get("/health").status_code == 503


def test_also_where_no_answer_is_begun(broken: httpx2.Client) -> None:
    body = {"prompt": "hello", "max_tokens": 1, "echo": True, "logprobs": 1}
    assert broken.post("/v1/completions", json=body).status_code == 503
