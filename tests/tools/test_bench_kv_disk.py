"""tools/bench_kv_disk.py on a tiny model: two starts, the same ids, figures that add up; mistakes are said."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("bench_kv_disk")


def test_the_second_start_reads(
    bench: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny), "--tokens=600", "--new=3", "--threads=1", f"--directory={tmp_path}"]
    assert bench.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert lines[0].startswith("drive:") and found["drive_gbps"] > 0
    assert found["tokens"] == found["disk_tokens"] == 576 and found["same_ids"] is True
    assert found["ratio"] == pytest.approx(found["second_s"] / found["first_s"])
    assert found["kept_bytes"] >= 576 * found["row_bytes"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--tokens=255"], ["--new=0"], ["--tokens=none"]])
def test_mistakes(bench: ModuleType, tiny: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(tiny), *arguments]) == 2
    assert capsys.readouterr().err


def test_no_model(bench: ModuleType, tmp_path: Path) -> None:
    assert bench.main([str(tmp_path), "--tokens=512"]) == 4
