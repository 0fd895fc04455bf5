"""The web page as it is served; what it looks like and does in a browser, tools/shoot_page.py shows."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx2
import pytest

from hybrid.kimi import Kimi
from hybrid.serve.app import Settings, create_app
from hybrid.serve.desk import Desk
from hybrid.serve.site import PAGE, TYPES

FILES = sorted(path.name for path in PAGE.iterdir())
SVG = "http://www.w3.org/2000/svg"  # a name, not an address


def test_the_page_may_do_nothing_but_talk_to_its_server(client: httpx2.Client) -> None:
    response = client.get("/")
    assert response.status_code == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy) and "*" not in str(policy)
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", FILES)
def test_files(client: httpx2.Client, name: str) -> None:
    response = client.get(f"/page/{name}")
    assert response.content == (PAGE / name).read_bytes()
    assert response.headers["content-type"] == TYPES[Path(name).suffix]
    assert "content-security-policy" in response.headers


def test_no_other_file_is_sent(client: httpx2.Client) -> None:
    for path in ("/page/", "/page/none.js", "/page/../site.py", "/page/..%2Fsite.py", "/page/%2Fetc%2Fpasswd"):
        assert client.get(path).status_code == 404, path


@pytest.mark.parametrize("name", FILES)
def test_nothing_comes_from_elsewhere(name: str) -> None:
    text = (PAGE / name).read_text().replace(SVG, "")
    found = re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]\S*", text, re.IGNORECASE)
    assert not found, found
    assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|new Function)\b", text)
    assert not re.search(r"""\s(on\w+|style)=["']""", text), "the policy forbids both"


def test_what_one_file_names_another_is_there() -> None:
    texts = {name: (PAGE / name).read_text() for name in FILES}
    for text in texts.values():
        named = re.findall(r'(?:from "\.|="/page)/([\w.]+)"', text)
        assert set(named) <= set(FILES), named
    ids = set(re.findall(r'\bid="([\w-]+)"', texts["index.html"]))
    for name, text in texts.items():
        assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= ids, name


def test_it_stays_small() -> None:
    sizes = {name: (PAGE / name).stat().st_size for name in FILES}
    assert sum(sizes.values()) < 100_000, sizes
    assert max(len((PAGE / name).read_text().splitlines()) for name in FILES) < 400


def test_the_page_needs_no_key_and_what_it_asks_does(kimi: Kimi, address: str) -> None:
    app = create_app(kimi, Desk(kimi, 1, 0), Settings(api_key="secret"))

    async def ask(path: str, key: str = "") -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return (await client.get(path, headers=headers)).status_code

    assert asyncio.run(ask("/")) == asyncio.run(ask("/page/main.js")) == 200
    assert asyncio.run(ask("/v1/kimi/server")) == 401
    assert asyncio.run(ask("/v1/kimi/server", "secret")) == 200
