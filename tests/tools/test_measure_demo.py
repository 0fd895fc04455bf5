"""The measuring tool of the demo model: its figures worked out by hand, and how it takes its text."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("measure_demo")


def test_figures(tool: ModuleType) -> None:
    """Two positions, three tokens, the last of which only one model has."""
    expected = torch.tensor([[[0.25, 0.75, 0], [0.5, 0.5, 0]]]).log()
    found = torch.tensor([[[0.5, 0.5, 0], [0.5, 0.5, 0]]]).log()
    score = tool.score(expected, found, torch.tensor([[0, 1]]))
    assert score.perplexity == pytest.approx(2)
    assert score.kl == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2)
    assert score.top1 == 0.5
    assert tool.score(expected, expected, torch.tensor([[0, 1]])).kl == 0


def test_texts(tool: ModuleType, tmp_path: Path) -> None:
    plain, abstracts = tmp_path / "plain.txt", tmp_path / "abstracts.json"
    plain.write_text("one two", encoding="utf-8")
    abstracts.write_text(json.dumps({"a": {"extract": "three"}, "b": "four"}), encoding="utf-8")
    found = tool.texts([plain, abstracts])
    assert found[0] == "one two" and sorted(found[1:]) == ["four", "three"]
    assert tool.texts([plain, abstracts]) == found


def test_without_text_it_says_where_to_get_some(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_demo.py"])
    with pytest.raises(SystemExit) as caught:
        tool.main()
    assert caught.value.code == 2 and "pip download" in capsys.readouterr().err
