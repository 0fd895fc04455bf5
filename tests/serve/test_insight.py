"""What the page is told of the model at work."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from hybrid.kimi import Kimi
from hybrid.serve.desk import REMEMBERED, Desk
from hybrid.serve.insight import Inside, heat, top
from hybrid.stats import Stats
from tests.serve.conftest import CTX, serving

CHAT = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 400, "stream": True}


def test_the_server(client: httpx2.Client, kimi: Kimi) -> None:
    told = client.get("/v1/kimi/server").json()
    assert told["name"] == kimi.name and told["ctx"] == kimi.ctx and told["thinking"] is True
    assert told["images"] is False
    assert told["model"]["layers"] == 3 and told["model"]["moe_layers"] == 2 and told["model"]["experts"] == 8
    assert told["machine"]["threads"] >= 1 and told["machine"]["versions"]["torch"]
    assert told["figures"]["rss"] > 0


def test_memory(client: httpx2.Client) -> None:
    client.post(CHAT, json=LONG | {"stream": False, "max_tokens": 4})
    told = client.get("/v1/kimi/memory").json()
    ram = told["ram"]
    assert told["vram"] is None and told["nvme"] is None, "all of it is in RAM"
    assert {"experts", "weights", "kv", "program", "others"} == set(ram["planned"])
    assert sum(ram["real"].values()) <= ram["size"]
    assert ram["real"]["experts"] == ram["planned"]["experts"], "they are loaded"
    assert 0 < ram["real"]["kv"] <= ram["planned"]["kv"]
    prefix = told["prefix"]
    assert 0 <= prefix["free"] < prefix["pages"] and prefix["prompt_tokens"] >= prefix["reused_tokens"]


def unpacked(told: dict[str, Any], name: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(told[name]), np.uint8).reshape(len(told["layers"]), told["experts"])


def test_experts(client: httpx2.Client, kimi: Kimi) -> None:
    client.post(CHAT, json=LONG | {"stream": False, "max_tokens": 20})
    told, counts = client.get("/v1/kimi/experts").json(), kimi.insight.counts()
    assert told["layers"] == [1, 2] and told["per_token"] == 4 and told["cache"] is None and told["tier"] is None
    assert (unpacked(told, "places") == 0).all()
    assert ((unpacked(told, "heat") > 0) == (counts > 0)).all()
    assert told["choices"] == counts.sum(1).tolist() and told["peaks"] == counts.max(1).tolist()
    best = told["top"][0]
    assert best["choices"] == counts.max() == counts[told["layers"].index(best["layer"]), best["expert"]]


def test_heat_and_top() -> None:
    counts = np.array([[0, 1, 4], [0, 0, 0]])
    assert heat(counts).tolist() == [[0, 128, 255], [0, 0, 0]]
    assert top(counts, [1, 2]) == [
        {"layer": 1, "expert": 2, "choices": 4},
        {"layer": 1, "expert": 1, "choices": 1},
    ]
    assert heat(np.zeros((0, 0), np.int64)).size == 0 and top(np.zeros((0, 0), np.int64), []) == [], "a dense model"


def events(response: httpx2.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_chosen_experts_add_up(client: httpx2.Client, kimi: Kimi) -> None:
    before, total = kimi.insight.counts(), np.zeros(16, np.int64)
    with client.stream("GET", "/v1/kimi/events") as response:
        told = events(response)
        assert next(told) == {"cells": [], "times": []}
        client.post(CHAT, json=LONG | {"stream": False, "max_tokens": 30})
        wanted = (kimi.insight.counts() - before).reshape(-1)
        assert wanted.sum() > 0
        for event in told:
            total[event["cells"]] += event["times"]
            if total.sum() >= wanted.sum():
                break
    assert (total == wanted).all()


def test_a_quiet_stream_is_kept_alive(client: httpx2.Client) -> None:
    with client.stream("GET", "/v1/kimi/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert any(line == ": keep-alive" for line, _ in zip(response.iter_lines(), range(100), strict=False))


def test_answer_now(client: httpx2.Client, kimi: Kimi, address: str) -> None:
    ends = [*kimi.stop_ids, kimi.tokenizer.specials["</think>"]]
    endless = {"seed": 3, "max_tokens": 1500, "logit_bias": dict.fromkeys(map(str, ends), -100)}
    with client.stream("POST", CHAT, json=LONG | endless) as response:
        told = events(response)
        thought = next(event for event in told if event["choices"][0]["delta"].get("reasoning_content"))
        answer = httpx2.post(f"{address}/v1/kimi/answer-now", json={"id": thought["id"]}, timeout=30)
        assert answer.json() == {"id": thought["id"], "thinking": True}
        later = ("content" if event["choices"][0]["delta"].get("content") else "" for event in told)
        assert "content" in later, "the answer has begun"


def test_the_figures_of_an_answer(client: httpx2.Client) -> None:
    answer = client.post(CHAT, json=LONG | {"stream": False, "max_tokens": 4}).json()
    told = client.get(f"/v1/kimi/answers/{answer['id']}").json()
    assert told["id"] == answer["id"] and told["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert told["thinking_tokens"] + told["answer_tokens"] == 4 and told["host_bytes"] > 0
    refused = client.get("/v1/kimi/answers/chatcmpl-none")
    assert refused.status_code == 404 and refused.json()["error"]["code"] == "not_found"


def test_figures_are_forgotten_in_the_end(client: httpx2.Client, kimi: Kimi) -> None:
    desk = Desk(kimi, 1, 0)

    class Ended:
        reply, name = type("", (), {"stats": Stats()}), ""

    for number in range(REMEMBERED + 1):
        desk.call(Ended(), str(number))  # type: ignore[arg-type]
    assert desk.figures("0") is None and desk.figures("1") is desk.figures(str(REMEMBERED)) is not None


def test_nothing_is_told_of_a_disk_that_is_not_used(client: httpx2.Client) -> None:
    assert client.get("/v1/kimi/memory").json()["disk"] is None
    assert "kv_disk" not in client.get("/metrics").text


def test_prompts_on_disk(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = tmp_path / "kimi-local" / "kv"
    body = {"messages": [{"role": "user", "content": "word " * 300}], "max_tokens": 2}
    seen = []
    for _ in range(2):
        with (
            Kimi.load(tiny, ctx=CTX, kv_disk=1 << 28) as own,
            serving(own) as address,
            httpx2.Client(base_url=address, timeout=60) as client,
        ):
            assert client.post(CHAT, json=body).status_code == 200
            metrics = dict(line.split() for line in client.get("/metrics").text.splitlines() if line[0] != "#")
            seen.append((client.get("/v1/kimi/memory").json()["disk"], metrics))
    (before, _), (after, metrics) = seen
    (directory,) = root.iterdir()
    sizes = [path.stat().st_size for path in directory.iterdir()]
    assert before["directory"] == after["directory"] == str(directory)
    assert before["restored_tokens"] == 0 and after["restored_tokens"] >= 256
    assert (after["blocks"], after["bytes"]) == (len(sizes), sum(sizes)) and after["bytes"] == after["used"]
    assert after["budget"] == 1 << 28
    names = {"used": "bytes", "budget": "budget_bytes", "blocks": "blocks"}
    assert all(float(metrics[f"kimi_local:kv_disk_{name}"]) == after[key] for key, name in names.items())
    assert float(metrics["kimi_local:prompt_disk_tokens_total"]) == after["restored_tokens"]


def test_answer_now_wants_an_answer_that_is_being_made(client: httpx2.Client) -> None:
    for body in ({"id": "chatcmpl-none"}, {"id": ""}):
        refused = client.post("/v1/kimi/answer-now", json=body)
        assert refused.status_code == 404 and refused.json()["error"]["param"] == "id"
    assert client.post("/v1/kimi/answer-now", json={}).status_code == 400


def test_a_watched_server_ends_at_once(kimi: Kimi, address: str) -> None:
    desk = Desk(kimi, 1, 0)
    inside = Inside(kimi, desk, keep_alive_s=5)

    async def watch() -> list[str]:
        found = []
        async for event in inside._choices():
            found.append(event)
            desk.stop()
        return found

    start = time.monotonic()
    assert len(asyncio.run(watch())) == 1 and time.monotonic() - start < 2
