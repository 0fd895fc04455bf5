"""A pack of random bits is a pack: it verifies, and the runtime runs it."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from hybrid import Kimi
from hybrid.checkpoint.pack_check import read_pack, scan_pack
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import experts

TOOLS = Path(__file__).parents[2] / "tools"


def test_is_a_sound_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr(experts, "encode_expert", experts.encode_expert)  # put back afterwards
    source = make_tiny(tmp_path / "model")
    tool = importlib.import_module("make_random_pack")
    assert tool.main([str(source), str(tmp_path / "pack"), "--mix", "gate_up=trellis1_5,down=trellis3"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "pack")
    assert read_pack(scan_pack(tmp_path / "pack")).is_verified
    with Kimi.load(tmp_path / "pack") as kimi:
        assert np.isfinite(kimi.logits([1, 2, 3]).numpy()).all()
    assert tool.main([str(tmp_path / "nothing"), str(tmp_path / "other")]) != 0
