"""Arrays that start on a page, so that no vector load straddles two cache lines and drives can read into them."""

import math

import numpy as np

PAGE = 4096


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised uint8 array of `shape`, page-aligned."""
    size = math.prod(shape)
    raw = np.empty(size + PAGE, np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + size].reshape(shape)
