"""`kimi-local stats`: what earlier runs chose, for eyes and for programs."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from numba.core import config
from rich.console import Console
from rich.theme import Theme

from cli.main import main
from cli.output import THEME
from cli.stats import bucketed, heat_table
from hybrid.checkpoint import open_checkpoint, open_pack
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import Settings, quantize
from hybrid.memory.router_stats import read_counts, save_counts, stats_file
from hybrid.memory.slots import slot_bytes


def program(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """kimi-local with a user's cache of its own; kernels compiled before are found where they are."""
    given = {"XDG_CACHE_HOME": str(cache), "XDG_STATE_HOME": str(cache), "NUMBA_CACHE_DIR": str(config.CACHE_DIR)}
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | given, timeout=60)


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """`kimi-local stats` in this process."""

    def call(*arguments: str) -> Run:
        for name, value in {"COLUMNS": "80", "NO_COLOR": "1"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            main(["stats", *arguments])
        written = capsys.readouterr()
        return Run(int(end.value.code or 0), written.out, written.err)

    return call


@pytest.fixture
def cache(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache in which expert 3 of layer 1 was chosen 90 times, and others less."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with open_checkpoint(tiny) as checkpoint:
        counts = read_counts(stats_file(checkpoint), checkpoint.config)
        counts[1], counts[2] = [0, 5, 0, 90, 5, 0, 0, 0], 10
        save_counts(stats_file(checkpoint), checkpoint.config, counts)
    return tmp_path


def test_people_see_a_line_per_layer(cache: Path, tiny: Path, run: Callable[..., Run]) -> None:
    shown = run(str(tiny))
    assert shown.code == 0, shown.err
    lines = [line.rstrip() for line in shown.out.splitlines()]
    assert lines[0] == f"{tiny.name}: 180 choices of experts"
    assert lines[1].split() == ["layer", "top", "10%", "bits", "heat"]
    assert lines[2].split()[:4] == ["1", "90%", "0.57", "▁"] and "█" in lines[2]
    assert lines[3].split()[:3] == ["2", "12%", "3.00"] and lines[3].endswith("▁" * 8)
    assert "3.00 bits: all experts alike" in lines[4]


def test_programs_get_every_count(cache: Path, tiny: Path, run: Callable[..., Run]) -> None:
    found = json.loads(run(str(tiny), "--json").out)
    assert found["model"] == tiny.name and found["choices"] == 180 and found["even_entropy_bits"] == 3
    first = found["layers"][0]
    assert first["layer"] == 1 and first["counts"] == [0, 5, 0, 90, 5, 0, 0, 0] and first["top10_share"] == 0.9
    assert Path(found["file"]).is_file()


def test_what_is_known_can_be_forgotten(cache: Path, tiny: Path, run: Callable[..., Run]) -> None:
    reset = run(str(tiny), "--reset")
    assert reset.code == 0 and "Forgot 180 choices" in reset.err and not reset.out
    assert "Nothing is recorded" in run(str(tiny)).out
    assert json.loads(run(str(tiny), "--json").out)["choices"] == 0


def test_no_model_is_one_line(tmp_path: Path, run: Callable[..., Run]) -> None:
    failed = run(str(tmp_path / "nowhere"))
    assert failed.code == 4 and failed.err.startswith("error: ") and failed.err.count("\n") == 1


@pytest.mark.parametrize("width", [40, 80, 200, 500])
def test_sixty_layers_of_384_experts_fit(width: int) -> None:
    counts = [(7 * i) % 50 for i in range(384)]
    layer = {"choices": sum(counts), "top10_share": 0.2, "entropy_bits": 8.1, "counts": counts}
    console = Console(width=width, no_color=True, record=True, file=io.StringIO(), theme=Theme(THEME))
    console.print(heat_table([{"layer": n} | layer for n in range(1, 61)], width))
    lines = console.export_text().splitlines()
    assert len(lines) == 61 and all(len(line) <= width for line in lines) and "…" not in "".join(lines)


def test_every_expert_is_in_one_cell() -> None:
    assert bucketed([1, 1, 4, 4, 4], 2) == [1, 4]
    assert bucketed([0, 8, 2], 3) == [0, 8, 2]


# -- where they come from ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packs")
    return quantize(make_tiny(root / "source"), root / "pack", Settings(mix=("trellis2", "trellis2")), threads=1)


def chat(pack: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    ceiling = cache / "kimi-local/bandwidth.json"  # or it would be measured, for seconds
    if not (cache / "kimi-local").exists():
        ceiling.parent.mkdir()
        ceiling.write_text(json.dumps({f"{platform.node()} 1": 10.0}))
    asked = ("-p", "Why?", "--no-think", "--temp=0", "-n", "6", "--no-history", "--threads=1", *arguments)
    return program("chat", str(pack), *asked, cache=cache)


def test_chats_are_recorded_and_the_drive_shows_in_the_figures_only(pack: Path, tmp_path: Path) -> None:
    with open_pack(pack) as opened:
        path, layers, size = tmp_path / "kimi-local/router" / stats_file(opened).name, opened.config, slot_bytes(opened)
    plain = chat(pack, tmp_path, "--no-stats")
    assert plain.returncode == 0 and plain.stdout.strip() and not path.exists(), "told not to record"
    some = chat(pack, tmp_path, "--stats", f"--ram-budget={6 * size}")
    assert some.returncode == 0 and some.stdout == plain.stdout
    assert "Filling RAM with the experts used most" in some.stderr
    assert re.search(r"NVMe [\d.]+ (kB|MB)/tok, \d+% of experts in RAM,\s+waited [\d.]+ m?s", some.stderr)
    once = read_counts(path, layers).sum()
    whole = chat(pack, tmp_path, "--stats")
    assert whole.stdout == plain.stdout and "NVMe" not in whole.stderr and "Filling RAM" not in whole.stderr
    assert read_counts(path, layers).sum() == 2 * once > 0


def test_too_little_ram_is_one_line(pack: Path, tmp_path: Path) -> None:
    failed = chat(pack, tmp_path, "--ram-budget=4096")
    assert failed.returncode == 3 and not failed.stdout
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1 and "At least" in failed.stderr


def test_a_cache_that_cannot_be_written_is_no_error(pack: Path, tmp_path: Path) -> None:
    (tmp_path / "kimi-local").mkdir()
    (tmp_path / "kimi-local" / "router").write_text("in the way")
    answered = chat(pack, tmp_path, "--quiet")
    assert answered.returncode == 0 and answered.stdout.strip() and not answered.stderr
