"""tools/bench_batch.py on a tiny model: figures that add up; mistakes are said."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("bench_batch")


def test_sizes_in_turns(
    bench: ModuleType, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "read_gbps", lambda *_: 10.0)
    assert bench.main([str(tiny), "--sizes=1,3,40", "--tokens=5", "--rounds=2", "--threads=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert lines[0].startswith("reading: 10.0 GB/s") and len(lines) == 5
    one, three, forty = found["rows"]
    assert (one["gain"], one["model_gain"]) == (1, 1)
    for row in found["rows"]:
        assert row["tok_s"] * row["step_s"] == pytest.approx(row["sequences"])
        assert row["bound_tok_s"] == pytest.approx(row["sequences"] * 10 / row["gb_per_step"])
        assert row["gain"] == pytest.approx(row["tok_s"] / one["tok_s"])
        assert row["model_gain"] <= row["sequences"]
    # Each expert is read once a step, whoever chose it.
    assert one["expert_gb_per_step"] < three["expert_gb_per_step"] < 3 * one["expert_gb_per_step"]
    assert forty["expert_gb_per_step"] < 20 * one["expert_gb_per_step"]
    residents = {round((row["gb_per_step"] - row["expert_gb_per_step"]) * 1e9) for row in found["rows"]}
    assert len(residents) == 1


def test_tokens_count_from_when_all_have_begun(bench: ModuleType, tiny: Path) -> None:
    with bench.Kimi.load(tiny, ctx=64, cache=64 * 64, threads=1) as kimi:
        sample = bench.measure(kimi, 40, 5, bench.random.Random(1))
    assert 4 * 40 <= sample.tokens <= 6 * 40 and sample.seconds > 0


@pytest.mark.parametrize("arguments", [["--tokens=1"], ["--rounds=0"], ["--sizes=0"]])
def test_mistakes(bench: ModuleType, tiny: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(tiny), *arguments]) == 2
    assert capsys.readouterr().err


def test_no_model(bench: ModuleType, tmp_path: Path) -> None:
    assert bench.main([str(tmp_path)]) == 4
