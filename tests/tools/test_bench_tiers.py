"""tools/bench_tiers.py on a tiny pack: the figures add up, the tokens are those from RAM, mistakes are said."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numba
import pytest
import torch

from hybrid.checkpoint import open_pack
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import Settings, quantize
from hybrid.memory.slots import slot_bytes


@pytest.fixture
def bench() -> Iterator[ModuleType]:
    threads = numba.get_num_threads(), torch.get_num_threads()
    yield importlib.import_module("bench_tiers")
    numba.set_num_threads(threads[0])
    torch.set_num_threads(threads[1])


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    return quantize(make_tiny(root / "source"), root / "pack", Settings(mix=("trellis2", "trellis2")), threads=1)


def test_the_figures_add_up(bench: ModuleType, pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_pack(pack) as opened:
        size = slot_bytes(opened)
    assert bench.main([str(pack), f"--ram-budget={6 * size}", "--tokens=5", "--threads=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert lines[0].startswith("drive:") and found["drive_gbps"] > 0
    assert found["slots"] == 6 and found["tokens"] == 5 and found["same_tokens"] is True
    assert found["hits"] + found["misses"] == 5 * 2 * 4 and 0 < found["hit_rate"] < 1
    assert found["nvme_bytes"] == 5 * found["nvme_bytes_per_token"] > 0
    allowed = 1e9 * found["drive_gbps"] / found["nvme_bytes_per_token"]
    assert found["share"] == pytest.approx(found["tok_s"] / allowed)
    assert found["share_of_both"] >= found["share"]


def test_ram_can_be_left_out(bench: ModuleType, pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_pack(pack) as opened:
        budget = 5 * slot_bytes(opened)
    assert bench.main([str(pack), f"--ram-budget={budget}", "--tokens=2", "--threads=1", "--no-ram"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ram_tok_s"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(["--ram-budget=1G"], 2, "All experts fit"), (["--ram-budget=1k"], 3, "a token needs 4"),
     (["--ram-budget=1M", "--tokens=0"], 2, "Counts must be")],
)  # fmt: skip
def test_mistakes(
    bench: ModuleType, pack: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert bench.main([str(pack), *arguments]) == code
    assert message in capsys.readouterr().err


def test_only_packs(bench: ModuleType, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(tiny), "--ram-budget=1M"]) == 2
    assert "is no pack" in capsys.readouterr().err
