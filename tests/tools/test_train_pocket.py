"""The command line of the pocket model's training, on a batch or two of the full-size model."""

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pocket.plot import plot, series
from pocket.state import LOG, SETTINGS

from hybrid import Kimi
from hybrid.chat.tokenizer import write_tokenizer
from hybrid.errors import KimiError
from tests.tools.pocket_copy import Copy

OPTIONS = ["--batch=1", "--shard=1", "--length=32"]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> object:
    """The tool with a task that needs no preparation."""
    copy = SimpleNamespace(Dataset=lambda directory, seed: Copy())
    monkeypatch.setitem(importlib.import_module("sys").modules, "pocket.dataset", copy)
    threads = torch.get_num_threads()
    yield importlib.import_module("train_pocket")
    torch.set_num_threads(threads)


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["train_pocket.py", *map(str, arguments)])
    try:
        return tool.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_from_nothing_to_a_model(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    pairs = [bytes([a, b]) for a in range(14) for b in range(256)]
    write_tokenizer(data, [*(bytes([byte]) for byte in range(256)), *pairs])
    assert run(tool, monkeypatch, "train", data, "--out", out, "--steps=2", *OPTIONS) == 0
    assert json.loads((out / SETTINGS).read_text())["steps"] == 2 and (out / LOG).exists()
    assert run(tool, monkeypatch, "train", data, "--out", out) == 0, "a finished run stays finished"
    assert run(tool, monkeypatch, "branch", out, data, tmp_path / "end", "--steps=1", "--lr=0.1", "--plateau=1") == 0
    assert run(tool, monkeypatch, "export", out, tmp_path / "model", "--data", data) == 0
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) < 30e6
    with Kimi.load(tmp_path / "model", ctx=64, threads=1) as kimi:
        assert torch.isfinite(kimi.logits([1, 2, 3])).all()


def test_a_rate_needs_to_know_for_how_long(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tool, monkeypatch, "branch", tmp_path, tmp_path, tmp_path / "end", "--lr=0.1") == 1
    assert "need --steps" in capsys.readouterr().err


def test_a_length_is_needed(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tool, monkeypatch, "train", tmp_path, "--out", tmp_path / "run", *OPTIONS) == 1
    assert "Give --steps or --minutes" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_minutes_become_steps(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tool, "seconds_per_step", lambda settings, data, threads: 20.0)
    arguments = ["train", tmp_path, "--out", tmp_path / "run", "--minutes=1", "--qat-share=0.34", "--no-clip"]
    assert run(tool, monkeypatch, *arguments, *OPTIONS) == 0
    settings = json.loads((tmp_path / "run" / SETTINGS).read_text())
    assert (settings["steps"], settings["decay_from"], settings["qat_from"], settings["tau"]) == (3, 2, 2, None)


def test_a_log_as_curves(tmp_path: Path) -> None:
    lines = [{"tokens": 10 * n, "loss": 1 / n, "max_logit": [n, 2.0 * n]} for n in (1, 2)]
    (tmp_path / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert series(tmp_path) == ([10, 20], [1.0, 0.5], [2.0, 4.0])
    with pytest.raises(KimiError, match="has no log"):
        series(tmp_path / "other")


def test_without_matplotlib_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "matplotlib.figure", None)
    with pytest.raises(KimiError, match="pip install matplotlib"):
        plot([tmp_path], tmp_path / "image.png")
