"""This machine's memory bandwidth, measured once and remembered."""

import platform

import numba
import platformdirs

from hybrid.memory.remembered import recall, remember

MEGABYTES, PASSES = 1024, 5


def ram_ceiling_gbps(threads: int) -> float:
    """Read bandwidth of `threads` threads in GB/s: the best of a few passes over 1 GiB, kept in the user's cache."""
    path = platformdirs.user_cache_path("kimi-local") / "bandwidth.json"
    key = f"{platform.node()} {threads}"
    known = recall(path)
    if key not in known:
        known[key] = _measure(threads)
        remember(path, known)
    return known[key]


def _measure(threads: int) -> float:
    from quant.bandwidth import read_gbps

    before = numba.get_num_threads()
    speed = read_gbps(MEGABYTES, threads, PASSES)
    numba.set_num_threads(before)
    return speed
