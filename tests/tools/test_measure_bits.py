"""tools/measure_bits.py: one row per size, and fewer bits are further away."""

import importlib
import json
from pathlib import Path

import pytest


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    def run(*arguments: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["measure_bits", *arguments])
        importlib.import_module("measure_bits").main()
        return capsys.readouterr().out.splitlines()

    return run


def test_fewer_bits_are_further_away(run, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words that a model of random weights knows nothing of. " * 20)
    few = ("--cases", "0", "--text", str(text), "--tokens", "256", "--calibrate", str(text))
    *lines, last = run(str(tiny), "--bits", "3", "1.8", *few)
    found = json.loads(last)
    assert found["calibrated"]
    rows = found["rows"]
    assert [row["bits"] for row in rows] == [None, 3, 1.8]
    assert rows[0]["kl_mean"] == 0 < rows[1]["kl_mean"] < rows[2]["kl_mean"]
    assert len(lines) == 2 + len(rows) and {line.count("|") for line in lines} == {5}


def test_what_eval_says_against_it_is_said(run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(str(tmp_path / "none"), "--cases", "0")
    assert stopped.value.code != 0
    assert len(capsys.readouterr().err.splitlines()) == 1
