"""Clients that leave, and many at once."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from hybrid.chat.message import Message, Think
from hybrid.kimi import Kimi
from hybrid.progress import OnProgress, Progress
from hybrid.reply import Reply
from hybrid.serve.job import Job, Prefill

PATH = "/v1/chat/completions"


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 1500, "temperature": 0, **more}


def send(address: str, request: dict[str, Any]) -> socket.socket:
    """A request on a connection that the test may cut."""
    place = urlsplit(address)
    assert place.hostname and place.port
    content = json.dumps(request)
    connection = socket.create_connection((place.hostname, place.port))
    head = f"POST {PATH} HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n{content}".encode())
    return connection


def test_what_is_done_before_the_reply_is_there_is_told_after_it(kimi: Kimi, address: str) -> None:
    early = Progress("prefill", 1, 9, "tok")

    def start(on_progress: OnProgress) -> Reply:
        on_progress(early)  # as a model does that is shared: it begins while the request still returns
        return kimi.reply([Message("user", "hello")], replace(kimi.default_params(True), max_tokens=2))

    async def watch() -> list[Any]:
        job = Job(start, lambda job: None)
        await job.started()
        return [event async for event in job.events()]

    first, *others = asyncio.run(watch())
    assert isinstance(first, Prefill) and (first.done, first.total) == (early.done, early.total)
    assert any(isinstance(event, Think) for event in others)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(
    address: str, gauge: Callable[[str], float], idle: Callable[[float], None], stream: bool
) -> None:
    with send(address, body("go on for ever", stream=stream)) as connection:
        if stream:
            connection.recv(4096)
        end = time.monotonic() + 5
        while not gauge("requests_processing"):
            assert time.monotonic() < end
    before = gauge("tokens_predicted_total")
    idle(1.0)
    assert gauge("tokens_predicted_total") - before < 1400


def test_also_while_the_prompt_is_read(
    address: str, gauge: Callable[[str], float], idle: Callable[[float], None]
) -> None:
    with send(address, body("slow: " + "word " * 200)):
        end = time.monotonic() + 5
        while not gauge("requests_processing"):
            assert time.monotonic() < end
    idle(1.0)


def test_health_is_answered_meanwhile(address: str, client: httpx2.Client, idle: Callable[[float], None]) -> None:
    with send(address, body("go on", stream=True)) as connection:
        connection.recv(4096)
        waits = []
        for _ in range(50):
            start = time.perf_counter()
            assert client.get("/health").json()["status"] == "ok"
            waits.append(time.perf_counter() - start)
    assert sorted(waits)[-2] < 0.5
    idle(2.0)


def test_many_at_once_get_what_each_would_get_alone(client: httpx2.Client) -> None:
    requests = [body(f"question {n} " * (1 + n % 3), max_tokens=24, stream=n % 2 == 0) for n in range(8)]
    alone = [_answer(client, request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda request: _answer(client, request), requests))
    assert together == alone and len(set(alone)) > 1


def _answer(client: httpx2.Client, request: dict[str, Any]) -> str:
    response = client.post(PATH, json=request)
    assert response.status_code == 200
    if not request["stream"]:
        message = response.json()["choices"][0]["message"]
        return message.get("reasoning_content", "") + "|" + message["content"]
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for line in lines for choice in json.loads(line)["choices"]]
    return "|".join("".join(delta.get(kind, "") for delta in deltas) for kind in ("reasoning_content", "content"))
