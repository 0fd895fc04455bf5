"""This machine's memory bandwidth, measured once and remembered."""

import platform
from pathlib import Path

import numba
import platformdirs

from hybrid.memory.remembered import recall, remember

MEGABYTES, PASSES = 1024, 5


def ram_ceiling_gbps(threads: int) -> float:
    """Read bandwidth of `threads` threads in GB/s: the best of a few passes over 1 GiB, kept in the user's cache."""
    known, key = recall(_path()), _key(threads)
    if key not in known:
        known[key] = _measure(threads)
        remember(_path(), known)
    return known[key]


def remembered_ceiling(threads: int) -> float | None:
    """The same if it was measured before: measuring would disturb whoever is at work, and be wrong."""
    return recall(_path()).get(_key(threads))


def _path() -> Path:
    return platformdirs.user_cache_path("kimi-local") / "bandwidth.json"


def _key(threads: int) -> str:
    return f"{platform.node()} {threads}"


def _measure(threads: int) -> float:
    from quant.bandwidth import read_gbps

    before = numba.get_num_threads()
    speed = read_gbps(MEGABYTES, threads, PASSES)
    numba.set_num_threads(before)
    return speed
