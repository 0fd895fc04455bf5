"""Models by name."""

from pathlib import Path

import pytest

from cli.compare import compare
from cli.doctor import doctor
from cli.quantize import quantize
from hybrid import Kimi, demo, pocket
from hybrid.errors import CheckpointError, UsageError
from hybrid.names import model_path
from hybrid.progress import Progress
from tests.checkpoint import damage


def test_any_other_name_is_left_as_it_is() -> None:
    for given in ("./models/x", "moonshotai/Kimi-K2.5", Path("~/demo"), "demonstration", ""):
        assert model_path(given) is given


def test_a_directory_here_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "pocket"):
        (tmp_path / name).mkdir()
        assert model_path(name) == name


def test_the_demo_model_is_built_with_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(report: demo.OnProgress) -> Path:
        report(1, 2, "layers")
        return tmp_path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "demo_path", build)
    seen: list[Progress] = []
    assert model_path("demo", seen.append) == tmp_path
    assert seen == [Progress("demo", 1, 2, "layers")]


def test_the_pocket_model_comes_along_or_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pocket, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match="no pocket model"):
        model_path("pocket")
    (tmp_path / "pocket-1").mkdir()
    (tmp_path / "pocket-1" / "config.json").write_text("{}")
    assert model_path("pocket") == tmp_path / "pocket-1"


def test_every_command_takes_names(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = damage.copy(tiny, tmp_path / "installed" / "pocket-1")
    monkeypatch.setattr(pocket, "__file__", str(model.with_name("__init__.py")))
    (tmp_path / "words.txt").write_text("one and the other " * 20)
    with Kimi.load("pocket", ctx=64, threads=1) as kimi:
        assert kimi.path == model
    doctor("pocket")
    compare("pocket", str(tiny), [Path("words.txt")], tokens=16, threads=1)
    quantize(Path("pocket"), tmp_path / "pack", mix="trellis2", dry_run=True)
    out = capsys.readouterr().out
    assert str(model) in out and "KL(A || B)" in out and "resident" in out


def test_a_model_that_comes_along_is_never_deleted(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = damage.copy(tiny, tmp_path / "installed" / "pocket-1")
    monkeypatch.setattr(pocket, "__file__", str(model.with_name("__init__.py")))
    with pytest.raises(UsageError, match="would delete the model pocket"):
        quantize(Path("pocket"), tmp_path / "pack", bits=4.5, delete_source=True)
    assert list(model.glob("*.safetensors"))
