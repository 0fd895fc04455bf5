"""Scales of a group of weights: bf16 as bits and back, and the scale that rounds a group with the least error."""

import numpy as np
from numba import njit

GROUP = 32
TINY = np.float32(1e-12)  # stands for the largest magnitude of an all-zero group
# Scales tried, relative to the one that just reaches the group's largest magnitude: clipping it often pays.
CANDIDATES = np.linspace(0.46, 1, 19)
LOWEST, HIGHEST = np.float32(-8), np.float32(7)  # four-bit codes; the largest magnitude is reached by 7


def to_bits(x: np.ndarray) -> np.ndarray:
    """uint16: the bits of the nearest bf16, ties to even; x fp32, finite."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """fp32 of bf16 bits uint16, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def search(groups: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """uint16 [n], bf16 bits: for each of groups fp32 [n, 32] the scale whose four-bit codes have the least error.

    The squared error of weight j of group i counts importance[i % m, j] times; importance fp32 [m, 32]. No scale is
    larger than the largest magnitude needs.
    """
    steps = (CANDIDATES / HIGHEST).astype(np.float32)
    return _search(np.ascontiguousarray(groups), np.ascontiguousarray(importance), steps)


@njit(cache=True, nogil=True)
def _search(groups, importance, steps):
    found = np.zeros(len(groups), np.uint16)
    for i in range(len(groups)):
        group, weights = groups[i], importance[i % len(importance)]
        largest = TINY
        for j in range(GROUP):
            largest = max(largest, abs(group[j]))
        least = np.float32(np.inf)
        for step in steps:
            bits = _nearest_bf16(largest * step)
            error = _error(group, weights, np.uint32(bits << np.uint32(16)).view(np.float32))
            if error < least:
                least, found[i] = error, bits
    return found


@njit
def _nearest_bf16(x):
    bits = np.float32(x).view(np.uint32)
    return np.uint32((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit
def _error(group, weights, scale):
    """Of rounding to multiples of `scale`, in fp32."""
    total = np.float32(0)
    for j in range(GROUP):
        code = min(max(np.rint(group[j] / scale), LOWEST), HIGHEST)
        missed = group[j] - code * scale
        total += missed * missed * weights[j]
    return total
