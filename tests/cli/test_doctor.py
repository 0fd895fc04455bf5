"""`kimi-local doctor`: what it prints, and how it ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from cli.doctor import doctor, environment
from hybrid.checkpoint.write import CHECKSUMS
from hybrid.errors import CheckpointError, UsageError
from hybrid.memory.hardware import Gpu, Hardware
from tests.checkpoint import damage
from tests.checkpoint.damage import SHARD

NORM = "language_model.model.layers.1.input_layernorm.weight"


@pytest.fixture
def model(tmp_path: Path, tiny: Path) -> Path:
    return damage.copy(tiny, tmp_path / "model")


def report(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0, **options: Any) -> dict[str, Any]:
    """The JSON a run prints, which must end with `code`."""
    try:
        doctor(*arguments, json_output=True, **options)
        ended = 0
    except typer.Exit as exit:
        ended = exit.exit_code
    assert ended == code
    return json.loads(capsys.readouterr().out)


def test_the_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    content = report(capsys)
    assert content["ok"] and content["model"] is None
    names = [row["name"] for row in content["environment"]]
    assert {"processor", "CPU features", "threads", "memory", "swap", "huge pages", "cache", "GPU"} <= set(names)
    assert content["hardware"]["ram_total"] > 0
    doctor()
    assert "This machine" in capsys.readouterr().out


def test_a_healthy_model(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    found = report(capsys, str(tiny), deep=True)["model"]
    assert found["ok"] and found["findings"] == [] and found["tensors"] == 187
    assert found["deep"]["is_verified"] and found["deep"]["checked_tensors"] == 187
    doctor(str(tiny), deep=True)
    out = capsys.readouterr().out
    assert "187 in 1 shard," in out and "All 187 tensors were compared" in out and "\x1b" not in out


def test_deviations_are_listed_and_end_with_4(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    damage.rewrite_header(model / SHARD, lambda header: header[NORM].update(dtype="F16"))
    with pytest.raises(typer.Exit) as ended:
        doctor(str(model))
    assert ended.value.exit_code == 4
    out = capsys.readouterr().out
    assert f"error: {NORM}: dtype F16, expected BF16" in out and "1 error, listed below" in out
    found = report(capsys, str(model), code=4)
    assert not found["ok"] and found["model"]["findings"][0]["where"] == NORM


def test_a_flipped_byte_ends_with_4(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    damage.flip_byte(model / SHARD, NORM)
    assert report(capsys, str(model))["ok"]
    assert "damaged" in report(capsys, str(model), deep=True, code=4)["model"]["findings"][0]["message"]


def test_long_lists_are_cut(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    damage.rewrite_json(model / "config.json", lambda config: config["text_config"].update(n_routed_experts=32))
    with pytest.raises(typer.Exit):
        doctor(str(model))
    out = capsys.readouterr().out
    assert out.count("missing tensor") <= 20 and "more (--json lists all)" in out


def test_checksums_are_recorded_on_request(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    (model / CHECKSUMS).unlink()
    doctor(str(model), deep=True)
    assert "--write-checksums" in capsys.readouterr().out
    doctor(str(model), write_checksums=True)
    assert f"recorded in {model / CHECKSUMS}\n" in capsys.readouterr().out  # unbroken and unpadded in a pipe
    assert report(capsys, str(model), deep=True)["model"]["deep"]["is_verified"]


def test_an_absent_or_foreign_model(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    with pytest.raises(CheckpointError, match="no model directory moonshotai/Kimi-K2.5 here"):
        doctor("moonshotai/Kimi-K2.5")
    capsys.readouterr()
    found = report(capsys, "moonshotai/Kimi-K2.5", code=4)
    assert "kimi-local pull moonshotai/Kimi-K2.5" in found["model"]["error"]
    (model / "config.json").write_text('{"architectures": ["KimiK3ForCausalLM"]}')
    assert "KimiK3ForCausalLM" in report(capsys, str(model), code=4)["model"]["error"]


def test_deep_needs_a_model() -> None:
    with pytest.raises(UsageError, match="--deep needs a model"):
        doctor(deep=True)


def test_rows_say_what_to_do() -> None:
    slow = Hardware(kernels="generic", transparent_huge_pages="never", numa_nodes=2, memlock=-1)
    rows = {row.name: row for row in environment(slow)}
    assert {name for name, row in rows.items() if row.status == "warn"} >= {"CPU features", "huge pages", "NUMA nodes"}
    assert "numactl" in rows["NUMA nodes"].hint and rows["locked memory"].value == "unlimited"
    assert rows["processor"].value == "unknown" and rows["GPU"].status == "note"
    gpu = Gpu("RTX 4090", 24 << 30, 20 << 30, "8.9")
    rows = {row.name: row for row in environment(Hardware(kernels="avx2", gpus=(gpu,), cuda="12.8"))}
    assert rows["GPU"].value == "RTX 4090, 25.8 GB, 21.5 GB free, compute capability 8.9, CUDA 12.8"
