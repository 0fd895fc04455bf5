"""tools/corrupt_kv.py: no damage changes an answer, and the tool would notice one that did."""

import importlib
import json
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numba
import pytest
import torch


@pytest.fixture
def corrupt() -> Iterator[ModuleType]:
    threads = numba.get_num_threads(), torch.get_num_threads()
    yield importlib.import_module("corrupt_kv")
    numba.set_num_threads(threads[0])
    torch.set_num_threads(threads[1])


def test_no_damage_changes_an_answer(corrupt: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert corrupt.main(["--count=66", "--seed=1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["kinds"]) == len(corrupt.DAMAGES) and set(found["kinds"].values()) == {6}
    assert found["wrong"] == {"ids": 0, "rows": 0, "files": 0}
    assert len(found["reused"]) > 2


def test_it_notices_what_checksums_would_not(
    corrupt: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hybrid.memory.disk_kv._checksum", lambda parts: 0)
    monkeypatch.setattr("hybrid.memory.kv_files.zlib", SimpleNamespace(crc32=lambda data: 0))
    monkeypatch.setattr(corrupt, "DAMAGES", (corrupt.overwrite,))
    assert corrupt.main(["--count=4"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["wrong"]["rows"]
