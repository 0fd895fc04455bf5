"""The output as the state of a job: torn ends, foreign files, two processes, a full disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hybrid.batch.state import Journal, Output, paths
from hybrid.errors import DoesNotFit, KimiError, UsageError

SETTINGS = {"model": "m", "seed": 0}
DIGESTS = {"a": "1", "b": "2", "c\ud800": "3"}


def record(name: str) -> dict[str, Any]:
    return {"custom_id": name, "text": "naïve 漢\r\u2028\x85 " + name}


def begun(path: Path, settings: dict[str, Any] = SETTINGS, digests: dict[str, str] = DIGESTS, **more: Any) -> Output:
    return Output(path, settings, digests, **{"force": False} | more)


def test_what_is_written_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with begun(out) as output:
        output.answer([record("a")])
        output.answer([])
        output.fail([record("c\ud800")])
        assert (output.answered, output.failed) == ({"a"}, {"c\ud800"})
    with begun(out) as output:
        assert output.done == {"a", "c\ud800"}
        output.answer([record("b")])
    assert [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]] == [record("a"), record("b")]
    assert paths(out)[1] == tmp_path / "out.errors.jsonl" and paths(out)[2] == tmp_path / "out.manifest.json"


def test_a_line_torn_anywhere_is_taken_off_and_made_again(tmp_path: Path) -> None:
    whole, last = tmp_path / "whole.jsonl", [record("b"), record("c\ud800")]
    with begun(whole) as output:
        output.answer([record("a")])
        first = whole.stat().st_size
        output.answer(last)
    data = whole.read_bytes()
    for size in range(first, len(data) + 1):
        whole.write_bytes(data[:size])
        with begun(whole) as output:
            output.answer([each for each in last if each["custom_id"] not in output.done])
        assert whole.read_bytes() == data, size


def test_blocks_that_never_reached_the_disk_are_taken_off(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with begun(out) as output:
        output.answer([record("a")])
    data = out.read_bytes()
    for end in (b"\0" * 700, b"\0" * 50 + b"\n", b'{"custom_id": 3}\n', b"\xff\n"):
        out.write_bytes(data + end)
        with begun(out) as output:
            assert output.done == {"a"}
        assert out.read_bytes() == data


@pytest.mark.parametrize("content, message", [
    (b'{"custom_id": "a"}\nrubbish\n{"custom_id": "b"}\n', "Line 2 of .* is no answer"),
    (b'{"custom_id": "a"}\n{"custom_id": "a"}\n', "Line 2 of .* answers 'a' a second time"),
])  # fmt: skip
def test_damage_in_the_middle_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    out = tmp_path / "out.jsonl"
    begun(out).close()
    out.write_bytes(content)
    with pytest.raises(KimiError, match=message):
        begun(out, force=True)
    assert out.read_bytes() == content


@pytest.mark.parametrize("content", [b"my diary", b"my\ndiary\n", b'{"custom_id": "a"}\n{"custom_id": "b"}'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(KimiError):
        begun(out)
    assert out.read_bytes() == content


@pytest.mark.parametrize("settings, digests, what", [
    ({"model": "n", "seed": 0}, DIGESTS, "model was 'm' and is 'n'"),
    ({"model": "m", "seed": 0, "top_k": 3}, DIGESTS, "top_k was None and is 3"),
    (SETTINGS, DIGESTS | {"a": "9"}, "line 'a' asked for something else"),
    (SETTINGS, {"a": "1"}, "line 'b' is not in the input"),
])  # fmt: skip
def test_another_job_is_refused_unless_forced(tmp_path: Path, settings: Any, digests: Any, what: str) -> None:
    out = tmp_path / "out.jsonl"
    with begun(out) as output:
        output.answer([record("a")])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=what):
        begun(out, settings, digests)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.stat().st_size} == before
    with begun(out, settings, digests, force=True) as output:
        assert output.done == {"a"}
    begun(out, settings, digests).close()


def test_more_lines_are_welcome(tmp_path: Path) -> None:
    begun(tmp_path / "out.jsonl").close()
    begun(tmp_path / "out.jsonl", digests=DIGESTS | {"d": "4"}).close()


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    begun(tmp_path / "out.jsonl").close()
    for content in ("{", "[]", '{"settings": 3}'):
        (tmp_path / "out.manifest.json").write_text(content)
        with pytest.raises(KimiError, match="manifest"):
            begun(tmp_path / "out.jsonl")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with begun(tmp_path / "out.jsonl"), pytest.raises(KimiError, match="another process"):
        begun(tmp_path / "out.jsonl")
    begun(tmp_path / "out.jsonl").close()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no directory"):
        begun(tmp_path / "none" / "out.jsonl")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the line fits; it is taken off again, and the line can be written when there is room."""
    journal, pwrite = Journal(tmp_path / "out.jsonl"), os.pwrite
    journal.append([record("a")])
    before = journal.path.read_bytes()

    def full(file: int, data: bytes, offset: int) -> int:
        if len(data) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data[: len(data) // 2], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DoesNotFit, match="is full. Nothing is lost"):
            journal.append([record("b")])
    assert journal.path.read_bytes() == before and journal.done == {"a"}
    journal.append([record("b")])
    assert json.loads(journal.path.read_bytes().split(b"\n")[1]) == record("b")
    journal.close()
