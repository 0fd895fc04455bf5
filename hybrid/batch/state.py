"""The output file is the state of a job: what stands in it is done, and a run that begins looks there first.

Beside OUT.jsonl are OUT.errors.jsonl, for lines that cannot be answered, and OUT.manifest.json, which says what the
answers came from. Both lists only grow, and what was written is on the disk before anything else happens. A power cut
can therefore tear no more than the end, which the next run takes off.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hybrid.checkpoint.durable import explained, sync, write_durably
from hybrid.errors import KimiError, UsageError

FORCE = "Name another output, or go on regardless with --force: answers that are there stay."


class Journal:
    """A file of JSON lines, each with a custom_id, that is only appended to; one process at a time has it open.

    Opening changes nothing: `repair` comes before the first `append`. `done` are the names in the file, `is_new` says
    that it was empty. Raises KimiError for lines that are something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock()
            data = path.read_bytes()
            self.is_new = not data
            self.done, self._size = _finished(path, data)
        except BaseException:
            self.close()
            raise

    def repair(self) -> None:
        """Take off what a crash has left at the end."""
        os.ftruncate(self._file, self._size)
        os.fsync(self._file)
        sync(self.path.parent)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, all of them or, with DoesNotFit for a full disk, none; they are on the disk on return."""
        records = list(records)
        data = b"".join(_line(record) for record in records)
        with explained(self.path):
            try:
                self._write(data)
            except OSError:
                os.ftruncate(self._file, self._size)
                raise
        self._size += len(data)
        self.done.update(record["custom_id"] for record in records)

    def close(self) -> None:
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], self._size + done)
        os.fsync(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise KimiError(f"{self.path} is being written by another process.", "Wait for it, or stop it.") from error


def _line(record: Mapping[str, Any]) -> bytes:
    """Half a surrogate pair, which JSON may hold and UTF-8 may not, stays the escape it was."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _finished(path: Path, data: bytes) -> tuple[set[str], int]:
    """(names, bytes) of the whole lines of `data`. What a crash can leave at its end does not count."""
    names: set[str] = set()
    *lines, _torn = data.split(b"\n")
    size = 0
    for number, line in enumerate(lines, 1):
        name = _name(line)
        if name is None and number == len(lines):
            break
        if name is None or name in names:
            what = "is no answer of a batch" if name is None else f"answers {name!r} a second time"
            remedy = "Remove that line, or name another output; nothing was changed."
            raise KimiError(f"Line {number} of {path} {what}.", remedy)
        names.add(name)
        size += len(line) + 1
    return names, size


def _name(line: bytes) -> str | None:
    """The custom_id of a line of output, None if it is something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    name = record.get("custom_id") if isinstance(record, dict) else None
    return name if isinstance(name, str) else None


class Output:
    """The files of a job, open for one process; use as a context manager. `done` are the lines that need nothing more.

    `settings` are what answers depend on, `digests` the input's lines. Raises KimiError for files of another process,
    and UsageError, unless `force`, for an output that other settings or other lines led to.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], digests: Mapping[str, str], *, force: bool) -> None:
        self.answers_path, self.errors_path, self.manifest_path = paths(path)
        if not path.parent.is_dir():
            raise UsageError(f"There is no directory {path.parent}.", "Make it first.")
        self._answers = Journal(self.answers_path)
        try:
            self._errors = Journal(self.errors_path)
            try:
                self._claim({"version": 1, "settings": dict(settings), "lines": dict(digests)}, force)
            except BaseException:
                self._errors.close()
                raise
        except BaseException:
            self._answers.close()
            raise

    @property
    def answered(self) -> set[str]:
        return self._answers.done

    @property
    def failed(self) -> set[str]:
        return self._errors.done

    @property
    def done(self) -> set[str]:
        return self.answered | self.failed

    def answer(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._answers.append(records)

    def fail(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._errors.append(records)

    def close(self) -> None:
        """Give the files back; no file for errors is left where there were none."""
        if not self.failed:
            self.errors_path.unlink(missing_ok=True)
        self._errors.close()
        self._answers.close()

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _claim(self, wanted: dict[str, Any], force: bool) -> None:
        before = read_manifest(self.manifest_path)
        if not force:
            self._refuse_other(before, wanted)
        if before != wanted:
            with explained(self.manifest_path):
                write_durably(self.manifest_path, json.dumps(wanted, indent=1).encode() + b"\n")
        for journal in (self._answers, self._errors):
            journal.repair()

    def _refuse_other(self, before: dict[str, Any] | None, wanted: Mapping[str, Any]) -> None:
        if before is None:
            if not (self._answers.is_new and self._errors.is_new):
                raise UsageError(f"{self.answers_path} is there, and nothing says what its content came from.", FORCE)
            return
        if change := difference(before, wanted):
            raise UsageError(f"{self.answers_path} was begun with something else: {change}.", FORCE)


def paths(output: Path) -> tuple[Path, Path, Path]:
    """OUT.jsonl -> itself, OUT.errors.jsonl, OUT.manifest.json."""
    stem = output.name.removesuffix(".jsonl")
    return output, output.with_name(f"{stem}.errors.jsonl"), output.with_name(f"{stem}.manifest.json")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What a job's manifest says, None if there is none. Raises KimiError if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise KimiError(f"{path} is damaged: {error}.", "Delete it, and go on with --force.") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("settings", "lines")):
        raise KimiError(f"{path} is no manifest of a batch.", "Name another output.")
    return content


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first thing in which a job is not the one its output was begun with, in words; new lines are welcome."""
    old, new = before["settings"], now["settings"]
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            return f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
    for custom_id, digest in before["lines"].items():
        if custom_id not in now["lines"]:
            return f"its line {custom_id!r} is not in the input"
        if now["lines"][custom_id] != digest:
            return f"line {custom_id!r} asked for something else"
    return ""
