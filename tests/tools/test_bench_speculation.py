"""tools/bench_speculation.py on a tiny model: figures that add up, the same answers; mistakes are said."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("bench_speculation")


def test_both_prompts_both_ways(bench: ModuleType, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny), "--tokens=12", "--rounds=2", "--threads=1", "--dtype=float32"]
    assert bench.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert lines[0].startswith("steps:") and len(found["step_s"]) == bench.ROWS and found["ceiling"][0] == 1
    for name in bench.PROMPTS:
        each = found[name]
        assert each["same"] is True and 0 <= each["accepted"] <= each["drafted"]
        assert each["gain"] == pytest.approx(each["auto_tok_s"] / each["off_tok_s"])


@pytest.mark.parametrize("arguments", [["--tokens=1"], ["--rounds=0"]])
def test_mistakes(bench: ModuleType, tiny: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(tiny), *arguments]) == 2
    assert capsys.readouterr().err


def test_no_model(bench: ModuleType, tmp_path: Path) -> None:
    assert bench.main([str(tmp_path)]) == 4
