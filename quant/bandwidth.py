"""The ceiling: how fast this machine reads memory when it does nothing else."""

import time

import numpy as np
from numba import njit, prange, set_num_threads

from quant.simd import horizontal_xor, load_i32x16, prefetch, splat_i32, xor_i32

PIECE = 1 << 20
AHEAD = 2048


@njit(parallel=True, cache=True)
def _read(buffer, found):
    """xor of everything, a megabyte per iteration, four loads in flight."""
    for piece in prange(found.size):
        start = piece * PIECE
        a = splat_i32(np.int32(0))
        b, c, d = a, a, a
        for at in range(start, start + PIECE, 256):
            for line in range(4):
                prefetch(buffer, at + AHEAD + 64 * line)
            a, b = xor_i32(a, load_i32x16(buffer, at)), xor_i32(b, load_i32x16(buffer, at + 64))
            c, d = xor_i32(c, load_i32x16(buffer, at + 128)), xor_i32(d, load_i32x16(buffer, at + 192))
        found[piece] = horizontal_xor(xor_i32(xor_i32(a, b), xor_i32(c, d)))


def read_seconds(buffer: np.ndarray, threads: int) -> float:
    """Time to read a flat uint8 `buffer` (whole mebibytes of it) once with `threads` threads."""
    set_num_threads(threads)
    found = np.empty(buffer.size // PIECE, np.int32)
    _read(buffer[:PIECE], found[:1])  # compiled, or loaded, before the clock starts
    start = time.perf_counter()
    _read(buffer, found)
    return time.perf_counter() - start


def read_gbps(megabytes: int, threads: int, passes: int) -> float:
    """The best of `passes` passes over a buffer of its own, in 1e9 bytes per second: a ceiling, whatever else runs."""
    buffer = np.ones(megabytes * PIECE, np.uint8)  # written, so that every page is really there
    return max(buffer.size / read_seconds(buffer, threads) / 1e9 for _ in range(passes))
