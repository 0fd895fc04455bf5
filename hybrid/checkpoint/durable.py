"""Writing so that neither a killed process nor a power cut leaves half a file under its name."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybrid.errors import DoesNotFit, KimiError

AGAIN = "run the same command again; it continues where it stopped."


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """The file holds `data` to the last byte, or what it held before."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(data)
    move_durably(temporary, path)


def move_durably(source: Path, target: Path) -> None:
    """Flush `source` and give it its final name."""
    sync(source)
    os.replace(source, target)
    sync(target.parent)


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turns a disk that is full, or that cannot hold files of this size, into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFit(f"The disk of {target} is full. Nothing is lost.", f"Free space and {AGAIN}") from error
        if error.errno == errno.EFBIG:
            message = f"The file system of {target} does not take files of this size."
            raise DoesNotFit(message, "Choose one without a 4 GB limit (ext4, xfs, NTFS, ...).") from error
        raise


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold `directory` against a second process doing the same work. Raises KimiError if there is one."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise KimiError(f"{directory} is being written by another process.", "Wait for it, or stop it.") from error
    finally:
        os.close(descriptor)
