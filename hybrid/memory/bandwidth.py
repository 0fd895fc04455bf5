"""This machine's memory bandwidth, measured once and remembered."""

import json
import os
import platform
import tempfile
from pathlib import Path

import numba
import platformdirs

MEGABYTES, PASSES = 1024, 5


def ram_ceiling_gbps(threads: int) -> float:
    """Read bandwidth of `threads` threads in GB/s: the best of a few passes over 1 GiB, kept in the user's cache."""
    path = platformdirs.user_cache_path("kimi-local") / "bandwidth.json"
    key = f"{platform.node()} {threads}"
    known = _read(path)
    if key not in known:
        known[key] = _measure(threads)
        _write(path, known)
    return known[key]


def _measure(threads: int) -> float:
    from quant.bandwidth import read_gbps

    before = numba.get_num_threads()
    speed = read_gbps(MEGABYTES, threads, PASSES)
    numba.set_num_threads(before)
    return speed


def _read(path: Path) -> dict[str, float]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: dict[str, float]) -> None:
    """Keep `known`, whole or not at all; a cache that cannot be written is measured again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(known, file)
        os.replace(name, path)
    except OSError:
        return
