"""A server as a user starts it, for clients as users have them: `make acceptance`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hybrid.checkpoint.tiny import make_tiny


@pytest.fixture(scope="session")
def instant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that answers without reasoning."""
    directory = make_tiny(tmp_path_factory.mktemp("models") / "instant")
    file = directory / "generation_config.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | {"thinking": False}))
    return directory


@contextmanager
def served(model: Path, state: Path, *options: str) -> Iterator[str]:
    """The address of a `kimi-local serve` of `model`."""
    command = [sys.executable, "-m", "cli.main", "serve", str(model), "--port", "0", *options]
    environment = os.environ | {"XDG_STATE_HOME": str(state)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found, "the server did not start"
            yield found[0]
            assert process.poll() is None, "the server has ended by itself"
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def address(instant: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(instant, tmp_path_factory.mktemp("state"), "--ctx", "2k") as found:
        yield found
