"""Who is let in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx2
import pytest
from starlette.types import Receive, Scope, Send

from hybrid.serve.guard import Guard


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers with what it was sent."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def ask(path: str = "/v1", *, key: str | None = None, body: bytes = b"", **headers: str) -> httpx2.Response:
    guard = Guard(echo, host="kimi.lan", api_key=key, body_limit=1000)
    named = {name.replace("_", "-"): value.encode() for name, value in headers.items()}
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(guard), base_url="http://127.0.0.1") as client:
        return await client.post(path, content=body, headers=named)


def status(**arguments: str) -> int:
    return asyncio.run(ask(**arguments)).status_code  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "[::1]:80", "192.168.1.7", "KIMI.lan:8080"])
def test_names_of_this_machine(host: str) -> None:
    assert status(host=host) == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8080", "", "[::1", "localhost.evil.example"])
def test_rebound_names_are_refused(host: str) -> None:
    assert status(host=host) == 403


def test_pages_of_other_sites_are_refused() -> None:
    assert status(origin="https://evil.example") == 403
    assert status(origin="http://localhost:3000") == 200
    assert status(origin="app://editor") == 200  # no page


def test_the_key() -> None:
    assert status(key="secret") == 401
    assert status(key="secret", authorization="Bearer wrong") == 401
    assert status(key="secret", authorization="Bearer \u00e9") == 401
    assert status(key="secret", authorization="Basic secret") == 401
    assert status(key="secret", authorization="bearer secret") == 200
    assert status(key="schlüssel", authorization="Bearer schlüssel") == 200
    assert status(key="secret", x_api_key="secret") == 200
    for path in ("/health", "/", "/page/main.js"):
        assert status(key="secret", path=path) == 200
    for path in ("/page", "/pages/x", "/v1/kimi/experts", "/openapi.json"):
        assert status(key="secret", path=path) == 401


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_refusals_wear_the_envelope_of_their_api(path: str) -> None:
    response = asyncio.run(ask(path, key="secret"))
    assert response.json()["error"]["type"] == "authentication_error"
    assert (response.json().get("type") == "error") is (path == "/v1/messages")


def test_the_size_of_a_body() -> None:
    async def pieces() -> httpx2.Response:
        async def large() -> AsyncIterator[bytes]:
            for _ in range(11):
                yield b"x" * 100

        guard = Guard(echo, host="h", api_key=None, body_limit=1000)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(guard), base_url="http://127.0.0.1") as client:
            return await client.post("/", content=large())

    assert asyncio.run(ask(body=b"x" * 1000)).content == b"x" * 1000
    assert asyncio.run(ask(body=b"x" * 1001)).status_code == 413
    assert asyncio.run(pieces()).status_code == 413, "also where the length is not announced"
