"""`kimi-local serve` as a process."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.serve import show_page

SERVE = [sys.executable, "-m", "cli.main", "serve"]


@contextmanager
def served(home: dict[str, str], *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and the address that it prints."""
    process = subprocess.Popen(
        [*SERVE, *options, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=home
    )
    with process:
        try:
            assert process.stdout is not None and process.stderr is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found, process.stderr.read()
            yield process, found[0]
        finally:
            process.kill()


def fetch(address: str, body: dict[str, object] | None = None, key: str = "secret") -> dict[str, object]:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(address, json.dumps(body).encode() if body else None, headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def test_from_the_ready_line_to_ctrl_c(home: dict[str, str], tiny: Path) -> None:
    with served(home | {"KIMI_LOCAL_API_KEY": "secret"}, str(tiny), "--ctx", "2k") as (process, address):
        assert fetch(f"{address}/health") == {"status": "ok", "pid": process.pid}
        question = [{"role": "user", "content": "hello"}]
        body: dict[str, object] = {"messages": question, "max_tokens": 4}
        answer = fetch(f"{address}/v1/chat/completions", body)
        assert answer["model"] == tiny.name and answer["usage"]["completion_tokens"] <= 4  # type: ignore[index]
        host, port = address.removeprefix("http://").split(":")
        long = json.dumps({"messages": question, "stream": True, "max_tokens": 2000})
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer secret\r\n"
            kind = f"content-type: application/json\r\ncontent-length: {len(long)}\r\n\r\n"
            connection.sendall((head + kind + long).encode())
            assert connection.recv(4096)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0, "also in the middle of an answer"
        assert process.stderr is not None and process.stderr.read() == ""


def test_a_port_in_use_is_said_in_one_line(home: dict[str, str], tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run([*SERVE, str(tiny), "--port", port], capture_output=True, text=True, env=home, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(rf"error: Port {port} of 127\.0\.0\.1 cannot be used: .*--port.*\n", done.stderr)


def test_others_need_a_key(home: dict[str, str], tiny: Path) -> None:
    command = [*SERVE, str(tiny), "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, env=home, timeout=60)
    assert done.returncode == 2 and "--api-key" in done.stderr


def test_without_the_packages(home: dict[str, str], tiny: Path) -> None:
    code = f"import sys; sys.modules['fastapi'] = None; from cli.main import main; main(['serve', {str(tiny)!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=home, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: fastapi is not installed. Run: pip install")


def test_the_page_opens_and_does_not_hold_the_server_up(home: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    browser, seen = tmp_path / "browser", tmp_path / "seen"
    browser.write_text(f'#!/bin/sh\necho "$1" > {seen}.part && mv {seen}.part {seen}\n')
    browser.chmod(0o755)
    with served(home | {"BROWSER": f"{browser} %s"}, str(tiny), "--ctx", "2k", "--open") as (process, address):
        end = time.monotonic() + 20
        while not seen.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert seen.read_text() == f"{address}\n"
        with urllib.request.urlopen(address, timeout=30) as page:
            assert b"<title>kimi-local</title>" in page.read()
        with urllib.request.urlopen(f"{address}/v1/kimi/events", timeout=30) as watched:
            assert watched.readline()
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0 and time.monotonic() - start < 12, "nobody waits for those who only watch"


def test_without_a_browser(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(address: str) -> bool:
        raise webbrowser.Error

    for answer in (lambda address: False, fail):
        monkeypatch.setattr("webbrowser.open", answer)
        show_page("http://127.0.0.1:8080")
        assert "Open http://127.0.0.1:8080 in one." in capsys.readouterr().err
