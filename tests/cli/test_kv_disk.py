"""`chat --kv-disk`: what is read again after a restart, and when nothing may be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numba.core import config

from cli.options import ChatOptions
from cli.output import stats_line
from hybrid.stats import Stats

TEXT = "the of and to in is you that it he was for " * 20


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def chat(model: Path, cache: Path, *options: str) -> dict[str, Any]:
    """One answer by a program of its own, with `cache` as the user's."""
    given = {"XDG_CACHE_HOME": str(cache), "XDG_STATE_HOME": str(cache), "NUMBA_CACHE_DIR": str(config.CACHE_DIR)}
    command = [sys.executable, "-m", "cli.main", "chat", str(model), "-p", TEXT, "--json", "-n", "4", "--temp", "0"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KIMI_LOCAL_")}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=kept | given, timeout=60)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_second_start_reads_what_the_first_computed(tiny: Path, cache: Path) -> None:
    first, second = chat(tiny, cache), chat(tiny, cache)
    assert first["usage"]["cached_tokens"] == 0 and second["usage"]["cached_tokens"] >= 256
    assert first["text"] == second["text"]


def test_nothing_is_kept_where_nothing_is_to_be(tiny: Path, cache: Path) -> None:
    chat(tiny, cache, "--no-history")
    assert not (cache / "kimi-local" / "kv").exists()


@pytest.mark.parametrize(
    ("options", "bytes_"),
    [(ChatOptions(), None), (ChatOptions(kv_disk=0), 0), (ChatOptions(kv_disk=5, no_history=True), 0)],
)
def test_what_the_model_is_loaded_with(
    load_settings: Callable[..., dict[str, Any]], options: ChatOptions, bytes_: int | None
) -> None:
    assert load_settings(options)["kv_disk"] == bytes_


def test_the_line_below_an_answer_says_what_came_from_disk() -> None:
    stats = Stats(prompt_tokens=2000, cached_tokens=1984, answer_tokens=5)
    assert "(1,984 cached)" in stats_line(stats, 4096, None, 200)
    stats.disk_tokens = 1920
    assert "(1,984 cached, 1,920 from disk)" in stats_line(stats, 4096, None, 200)
