"""Which experts of an unfinished layer lie whole in its file: one line each, appended when the expert was written.

A line ends with its own crc32, so that one torn by a crash, or never flushed, counts as not written. The expert itself
is believed only if its bytes have the noted crc32 when the work is taken up again.
"""

import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from hybrid.checkpoint.durable import write_durably


class Entry(NamedTuple):
    """One finished expert. Errors are relative, of gate_up and down: as the encoder weighted them, and plain."""

    expert: int
    crc32: int
    errors: tuple[float, float]
    plain_errors: tuple[float, float]


class Journal:
    """The journal of one layer, open for more entries."""

    def __init__(self, path: Path, entries: dict[int, Entry]) -> None:
        """Start with `entries` only: what a crash left behind them is dropped."""
        self.path = path
        self.entries = dict(entries)
        write_durably(path, b"".join(_line(entry) for entry in entries.values()))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def add(self, entry: Entry) -> None:
        self.entries[entry.expert] = entry
        os.write(self._file, _line(entry))

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def read_journal(path: Path) -> dict[int, Entry]:
    """The whole entries of a journal by expert; none if there is no such file."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = (_parse(line) for line in lines)
    return {entry.expert: entry for entry in found if entry is not None}


def _line(entry: Entry) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return text + f" {zlib.crc32(text):08x}\n".encode()


def _parse(line: bytes) -> Entry | None:
    text, _, crc = line.rpartition(b" ")
    if f"{zlib.crc32(text):08x}".encode() != crc:
        return None
    expert, crc32, errors, plain = json.loads(text)
    return Entry(expert, crc32, tuple(errors), tuple(plain))
