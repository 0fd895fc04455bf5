"""The comparison tool: its figures on two answers worked out by hand, then every oracle on a tiny checkpoint."""

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(TOOLS))
    threads = torch.get_num_threads()
    yield importlib.import_module("logit_diff")
    torch.set_num_threads(threads)


def test_figures(tool: ModuleType) -> None:
    expected = torch.tensor([[0.0, math.log(3)], [2.0, 0.0]])  # 1/4 and 3/4 at the first position
    found = torch.tensor([[0.0, 0.0], [2.0, 0.0]])  # 1/2 and 1/2
    figures = tool.compare(expected, found)
    assert figures["kl"] == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2)
    assert figures["kl_worst"] == pytest.approx(2 * figures["kl"])
    assert figures["max_abs"] == pytest.approx(math.log(3))
    assert figures["relative_error"] == pytest.approx(math.log(3) / math.hypot(math.log(3), 2))
    assert figures["top1_agreement"] == 0.5
    assert (figures["worst_position"], figures["worst_error"]) == (0, 1.0)


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    monkeypatch.setattr("sys.argv", ["logit_diff.py", *args])
    tool.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(("against", "largest"), [("transformers", 2e-5), ("reference", 2e-5), ("int8", 0.3)])
def test_every_oracle(
    against: str,
    largest: float,
    tool: ModuleType,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = run(tool, monkeypatch, capsys, str(tiny), "--against", against, "--tokens", "40")
    assert result["tokens"] == 40
    assert 0 < result["relative_error"] < largest
    assert result["top1_agreement"] > 0.9


def test_an_absent_model_is_one_line(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tool, monkeypatch, capsys, str(tmp_path / "absent"))
    assert caught.value.code == 4
    assert capsys.readouterr().err.count("\n") == 1
