"""Reading files straight into place: past the page cache, at the drive's speed, with no second copy in memory.

A mapped file would be read a page fault at a time, and would fill the page cache with bytes that are wanted elsewhere.
"""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hybrid.checkpoint.header import REFETCH, damaged
from hybrid.errors import CheckpointError
from quant.aligned import PAGE, empty

FAILED = "What was being computed is lost. Check the drive, then try again."
READERS = 8  # threads: enough requests in flight for a drive to give what it can

Preadv = Callable[[int, Sequence[memoryview], int], int]  # os.preadv: descriptor, buffers, offset -> bytes read


class DirectFile:
    """A file to be read past the page cache, where its file system and the place of the bytes allow that.

    Any number of threads may read from it at once.
    """

    def __init__(self, path: Path, preadv: Preadv = os.preadv) -> None:
        """`preadv` does the reading. Raises CheckpointError if the file cannot be opened."""
        self.path = path
        self._preadv = preadv
        try:
            self._plain = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}.", REFETCH) from error
        self._direct = _open_direct(path)

    def read(self, offset: int, targets: Sequence[np.ndarray]) -> None:
        """Fill `targets`, contiguous uint8, with the bytes from `offset` on, one array after the other.

        Raises CheckpointError, naming the file, when the drive fails or the file ends too early.
        """
        left = _after(targets, 0)
        while left:
            count = self._once(offset, left)
            if count == 0:
                raise damaged(self.path, f"it ends before byte {offset:,}")
            offset += count
            left = _after(left, count)

    def close(self) -> None:
        """Only when no thread is reading."""
        os.close(self._plain)
        if self._direct is not None:
            os.close(self._direct)

    def _once(self, offset: int, targets: Sequence[np.ndarray]) -> int:
        """One call of the system; it may read less than was asked for."""
        direct = self._direct if offset % PAGE == 0 and all(map(_on_pages, targets)) else None
        buffers = [target.data for target in targets]
        try:
            if direct is not None:
                return self._preadv(direct, buffers, offset)
            count = self._preadv(self._plain, buffers, offset)
        except OSError as error:
            reason = "the drive failed" if error.errno == errno.EIO else error.strerror or str(error)
            raise CheckpointError(f"{self.path} cannot be read at byte {offset:,}: {reason}.", FAILED) from error
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._plain, offset, count, os.POSIX_FADV_DONTNEED)
        return count


def _open_direct(path: Path) -> int | None:
    """A descriptor that reads past the page cache; None where a page cannot be read that way."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)
    except OSError:
        return None
    try:
        os.preadv(descriptor, [empty((PAGE,)).data], 0)  # some file systems take the flag and then refuse to read
    except OSError as error:
        if error.errno == errno.EINVAL:
            os.close(descriptor)
            return None
    return descriptor


def _on_pages(target: np.ndarray) -> bool:
    return target.ctypes.data % PAGE == 0 and target.size % PAGE == 0


def _after(targets: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """What is left of `targets` behind their first `count` bytes."""
    left = []
    for target in targets:
        done = min(count, target.size)
        count -= done
        if done < target.size:
            left.append(target[done:])
    return left
