"""The servers of this user that run on this machine: each keeps a small file about itself while it listens.

A file is believed only if its process lives and the address answers as that process: both may have gone to others.
"""

import http.client
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from hybrid.memory.remembered import recall, remember

PATIENCE_S = 5.0
ANYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # listened on -> where this machine itself finds it


class Running(NamedTuple):
    """`model` is what the server was asked for, `path` the directory it serves, `started` seconds since 1970."""

    address: str
    pid: int
    model: str
    path: str
    started: float

    def serves(self, model: str | None) -> bool:
        """Whether it has the model that a person names so; None: whichever there is."""
        if model is None:
            return True
        path = Path(model).expanduser()
        return str(path.resolve()) == self.path if path.exists() else model == self.model


@contextmanager
def announced(directory: Path, server: Running) -> Iterator[None]:
    """`server` can be found in `directory` meanwhile."""
    file = directory / f"{server.pid}.json"
    remember(file, server._asdict())
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def running(directory: Path) -> list[Running]:
    """The servers that are there, newest first; files of those that are not are removed."""
    found = []
    for file in sorted(directory.glob("*.json")):
        server = _read(file)
        if server is not None and _is_alive(server):
            found.append(server)
        else:
            file.unlink(missing_ok=True)
    return sorted(found, key=lambda server: server.started, reverse=True)


def from_here(address: str) -> str:
    """The address for programs on this machine, of one that is listened on."""
    for anywhere, here in ANYWHERE.items():
        address = address.replace(f"//{anywhere}:", f"//{here}:")
    return address


def _read(file: Path) -> Running | None:
    facts = recall(file)
    try:
        server = Running(**facts)
    except TypeError:
        return None
    kinds: list[tuple[object, Any]] = [(server.pid, int), (server.started, int | float)]
    kinds += [(text, str) for text in (server.address, server.model, server.path)]
    return server if all(isinstance(value, kind) for value, kind in kinds) else None


def _is_alive(server: Running) -> bool:
    try:
        os.kill(server.pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # the number went to another: its address will not say that it is this one
    try:
        where = urlsplit(server.address)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=PATIENCE_S)
    except ValueError:
        return False
    try:
        connection.request("GET", "/health")
        health = json.load(connection.getresponse())
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()
    return isinstance(health, dict) and health.get("pid") == server.pid
