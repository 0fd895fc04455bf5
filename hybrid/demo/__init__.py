"""The demo model: a small real chat model in Kimi K2.5's checkpoint format, built on this machine on first use.

SmolLM2-135M-Instruct, taken from an installed Python package, is rewritten into K2.5's architecture without training
and saved in the user's cache. From there on it is a checkpoint like any other.
"""

import errno
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from hybrid.errors import CheckpointError, DoesNotFit, KimiError

VERSION = 1  # of the conversion; raise it with every change to what comes out
DISK_BYTES = 400_000_000
ABANDONED_S = 3600.0

OnProgress = Callable[[int, int, str], None]


def demo_directory() -> Path:
    """Where the demo model is, or will be once built."""
    return user_cache_path("kimi-local") / "models" / f"demo-{VERSION}"


def demo_path(on_progress: OnProgress | None = None) -> Path:
    """The demo model's directory, building it first if it is not there (tens of seconds, 1 GB of memory).

    `on_progress` is told (done, total, what). Raises MissingExtra if the source is not installed, CheckpointError if it
    is not the expected file, DoesNotFit if the disk is full. Two processes may build at once: one result is kept.
    """
    directory = demo_directory()
    if _is_complete(directory):
        return directory
    from hybrid.demo.convert import convert
    from hybrid.demo.gguf_source import GGUFLlama, check_sha256, find_gguf

    report = on_progress or (lambda done, total, text: None)
    path = find_gguf()
    report(0, 1, "checking the source")
    check_sha256(path)
    source = GGUFLlama(path)
    with _explained(directory):
        _prepare(directory)
        try:
            return convert(source, source.tokens, directory, on_progress=report)
        except (CheckpointError, OSError):
            if _is_complete(directory):  # another process was faster
                return directory
            raise


def _is_complete(directory: Path) -> bool:
    return (directory / "config.json").is_file()  # the writer renames a finished directory into place


def _prepare(directory: Path) -> None:
    """Make room: remove what killed builds left behind, then refuse a disk that is too full."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    for partial in directory.parent.glob(f".{directory.name}.partial-*"):
        if time.time() - partial.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(partial, ignore_errors=True)
    if shutil.disk_usage(directory.parent).free < DISK_BYTES:
        raise OSError(errno.ENOSPC, "too little space")


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Turn what a file system can refuse into one line and a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFit(
                f"The demo model takes {DISK_BYTES / 1e6:.0f} MB of disk, which {directory.parent} does not have.",
                "Free some space, or set XDG_CACHE_HOME to a directory on another disk.",
            ) from error
        raise KimiError(
            f"The demo model cannot be saved in {directory.parent}: {error.strerror or error}.",
            "Make it writable, or set XDG_CACHE_HOME to another directory.",
        ) from error
