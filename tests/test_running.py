"""The files that servers keep about themselves: who is believed, and what becomes of the others."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from hybrid.running import Running, announced, from_here, running
from tests.answering import answering


class _Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"status": "ok", "pid": os.getpid()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server that says it is this process."""
    with answering(_Health) as address:
        yield address


def record(address: str, **changed: object) -> Running:
    return Running(address, os.getpid(), "demo", "/models/demo-1", 1000.0)._replace(**changed)  # type: ignore[arg-type]


def test_a_server_is_found_while_it_is_there(address: str, tmp_path: Path) -> None:
    assert running(tmp_path / "none") == []
    with announced(tmp_path, record(address)):
        assert running(tmp_path) == [record(address)]
        (file,) = tmp_path.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == []


def test_the_newest_comes_first(address: str, tmp_path: Path) -> None:
    for name, started in (("1.json", 1.0), ("2.json", 3.0), ("3.json", 2.0)):
        (tmp_path / name).write_text(json.dumps(record(address, started=started)._asdict()))
    assert [server.started for server in running(tmp_path)] == [3.0, 2.0, 1.0]


def test_stale_records_are_removed(address: str, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = {
        "dead process": record(address, pid=ended.pid)._asdict(),
        "another's address": record(address, pid=os.getppid())._asdict(),
        "nobody answers": record("http://127.0.0.1:1")._asdict(),
        "no address": record("nonsense:port")._asdict(),
        "a number too large": record(address, pid=1 << 80)._asdict(),
        "other fields": {"port": 8080},
        "other kinds": record(address, pid="1")._asdict(),
        "no object": [1],
    }
    for name, facts in stale.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
    (tmp_path / "torn.json").write_text('{"address": "http')
    assert running(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_which_model_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (tmp_path / "link").symlink_to(directory)
    named, placed = record("http://127.0.0.1:1"), record("http://127.0.0.1:1", model="x", path=str(directory))
    assert named.serves(None) and placed.serves(None)
    assert named.serves("demo") and not named.serves("pocket") and not named.serves(str(directory))
    assert placed.serves(str(directory)) and placed.serves(str(tmp_path / "link")) and not placed.serves("demo")
    monkeypatch.chdir(tmp_path)
    assert placed.serves("model")


def test_an_address_that_is_listened_on_as_seen_from_here() -> None:
    assert from_here("http://0.0.0.0:8080") == "http://127.0.0.1:8080"
    assert from_here("http://[::]:8080") == "http://[::1]:8080"
    assert from_here("http://10.0.0.1:80") == "http://10.0.0.1:80"
