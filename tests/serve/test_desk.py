"""Places, and what is counted."""

from __future__ import annotations

import asyncio
import threading

import httpx2
import pytest

from hybrid.chat.message import Message
from hybrid.kimi import Kimi
from hybrid.progress import OnProgress
from hybrid.reply import Reply
from hybrid.serve.app import Settings, create_app
from hybrid.serve.desk import Desk
from hybrid.serve.refusal import Refusal

pytestmark = pytest.mark.usefixtures("address")  # the server has the model shared between threads


def values(desk: Desk) -> dict[str, float]:
    lines = [line.split() for line in desk.metrics().splitlines() if not line.startswith("#")]
    return {name.removeprefix("kimi_local:"): float(value) for name, value in lines}


def test_places_are_bounded_and_found_free_again(kimi: Kimi) -> None:
    desk, go = Desk(kimi, parallel=1, queue=1), threading.Event()

    def start(on_progress: OnProgress) -> Reply:
        assert go.wait(10)
        thrifty = kimi.default_params(True)
        return kimi.reply([Message("user", "say:</think>hi<|im_end|>")], thrifty, on_progress=on_progress)

    async def run() -> None:
        jobs = [desk.open(start), desk.open(start)]
        with pytest.raises(Refusal, match="places are taken") as caught:
            desk.open(start)
        assert caught.value.status == 429 and int(caught.value.headers["retry-after"]) >= 1
        assert values(desk)["requests_deferred"] == 2 and values(desk)["requests_refused_total"] == 1
        go.set()
        for job in jobs:
            await job.started()
            assert [event async for event in job.events()]
        await asyncio.sleep(0)
        desk.open(start).stop()

    asyncio.run(run())
    counted = values(desk)
    assert counted["requests_total"] == 3 and counted["tokens_predicted_total"] >= 6
    assert counted["prompt_tokens_total"] > 0 and counted["prompt_seconds_total"] > 0


def test_the_refusal_says_when_to_come_again(kimi: Kimi) -> None:
    desk, go = Desk(kimi, parallel=1, queue=0), threading.Event()

    def start(on_progress: OnProgress) -> Reply:
        assert go.wait(10)
        raise ValueError("never begun")

    async def run() -> httpx2.Response:
        job = desk.open(start)
        transport = httpx2.ASGITransport(create_app(kimi, desk, Settings()))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"messages": [{"role": "user", "content": "x"}]}
            response = await client.post("/v1/chat/completions", json=body)
        go.set()
        with pytest.raises(ValueError, match="never"):
            await job.started()
        return response

    response = asyncio.run(run())
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_what_cannot_begin_leaves_no_trace(kimi: Kimi) -> None:
    desk = Desk(kimi, parallel=1, queue=0)

    def start(on_progress: OnProgress) -> Reply:
        raise ValueError("no")

    async def run() -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                await desk.open(start).started()

    asyncio.run(run())
    assert values(desk)["requests_deferred"] == 0
