"""`kimi-local quantize`: what it prints, and how it ends."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli import main as program
from hybrid.checkpoint.pack_check import read_pack, scan_pack


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """What one command prints to stdout and stderr; it must end with `code`."""
    with pytest.raises(SystemExit) as ended:
        program.main(["quantize", *map(str, arguments)])
    out = capsys.readouterr()
    assert ended.value.code == code, out.err
    return out.out, out.err


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    target = tmp_path_factory.mktemp("packs") / "pack"
    with pytest.raises(SystemExit):
        program.main(["quantize", str(tiny), str(target), "--mix", "gate_up=trellis1_5,down=trellis3"])
    return target


def test_a_pack_is_made(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    target = tmp_path / "pack"
    out, err = run(capsys, tiny, target, "--mix", "trellis2", "--resident", "int4", "--threads", 1)
    assert out == f"{target}\n"
    lines = err.splitlines()
    assert lines[0].startswith("1/4 tables: ") and re.match(r"4/4 00002: .* mean error 0\.0\d+ · 100\.0%", lines[3])
    assert re.search(r"0\.0 s left · [\d.,]+ M weights/s · [\d.,]+ MB/s", lines[3])
    assert lines[4] == f"Check it: kimi-local doctor {target} --deep"
    assert read_pack(scan_pack(target)).is_verified
    out, _ = run(capsys, tiny, target, "--mix", "trellis2", "--resident", "int4", "--json")
    assert json.loads(out)["made_with"]["mix"] == ["trellis2", "trellis2"]  # it was there


def test_a_report_tells_formats_and_errors(capsys: pytest.CaptureFixture[str], pack: Path) -> None:
    out, _ = run(capsys, "--report", pack)
    assert re.search(r"1 +\S+ +trellis1_5 +0\.14\d\d +0\.1\d\d\d +trellis3 +0\.02\d\d +0\.02", out)
    assert "bits per weight, relative error 0.08" in out
    found = json.loads(run(capsys, "--report", pack, "--json")[0])
    assert [layer["layer"] for layer in found["layers"]] == [1, 2]
    assert len(found["layers"][0]["down"]["errors"]) == 8 and found["layers"][1]["down"]["formats"] == {"trellis3": 8}


def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    out, _ = run(capsys, tiny, tmp_path / "pack", "--bits", 3, "--dry-run")
    for words in ("bits per weight", "gate_up: ", "resident", "predicted, from", "M weights/s"):
        assert words in out
    found = json.loads(run(capsys, tiny, tmp_path / "pack", "--bits", 3, "--dry-run", "--json")[0])
    assert found["bits_per_weight"] <= 3 and list(tmp_path.iterdir()) == []


def test_a_dry_run_says_how_the_cache_is_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    room = (tiny, tmp_path / "pack", "--ram", "7GiB", "--ctx", "1k", "--dry-run")
    assert re.search(r"^KV cache +\S+ .B +left to 1,024 tokens in bf16$", run(capsys, *room)[0], re.MULTILINE)
    assert "left to 1,024 tokens in fp8" in run(capsys, *room, "--kv", "fp8")[0]
    assert "KV cache" not in run(capsys, tiny, tmp_path / "pack", "--bits", 3, "--dry-run")[0]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--mix", "trellis7"], 2, "is no mix"),
        (["--mix", "trellis2", "--bits", "2"], 2, "exclude each other"),
        (["--mix", "trellis2", "--format", "int4"], 2, "exclude each other"),
        (["--ram", "lots"], 2, "'lots' is no amount of memory"),
        (["--ram", "1GiB"], 3, "leave nothing for experts"),
        (["--bits", "0.5"], 3, "The experts need at least"),
        (["--calibration", "/nowhere"], 4, "is no calibration"),
    ],
)
def test_what_cannot_be_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, options: list[str], code: int, words: str
) -> None:
    out, err = run(capsys, tiny, tmp_path / "pack", *options, code=code)
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert list(tmp_path.iterdir()) == []


def test_a_report_needs_a_pack(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    assert "is no pack" in run(capsys, "--report", tiny, code=4)[1]


def test_arguments_are_needed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "needs SRC and DST" in run(capsys, tmp_path, code=2)[1]
    assert "no config.json" in run(capsys, tmp_path, tmp_path / "pack", code=4)[1]


def test_doctor_reads_a_pack(capsys: pytest.CaptureFixture[str], pack: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(["doctor", str(pack), "--deep", "--write-checksums"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "bits per weight: trellis1_5, trellis3" in out and "a pack carries its own" in out
    assert "All 16 experts and" in out
    path = pack / "experts-00002.bin"
    data = path.read_bytes()
    path.write_bytes(data[:7] + bytes([data[7] ^ 16]) + data[8:])
    with pytest.raises(SystemExit) as ended:
        program.main(["doctor", str(pack), "--deep", "--json"])
    path.write_bytes(data)
    findings = json.loads(capsys.readouterr().out)["model"]["findings"]
    assert ended.value.code == 4 and [finding["where"] for finding in findings] == ["layer 2 expert 0"]


def test_a_terminal_shows_one_line(tmp_path: Path, tiny: Path) -> None:
    terminal, line = pty.openpty()
    command = [sys.executable, "-m", "cli.main", "quantize", str(tiny), str(tmp_path / "pack"), "--mix", "trellis1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=line, env={**os.environ, "TERM": "xterm"})
    os.close(line)
    shown = b""
    while chunk := _read(terminal):
        shown += chunk
    os.close(terminal)
    assert process.communicate()[0].decode() == f"{tmp_path / 'pack'}\n" and process.returncode == 0
    assert "Quantizing" in shown.decode() and "M weights/s" in shown.decode() and "1/4" not in shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # how Linux reports that the other end is closed
        return b""


def test_help_names_the_options_and_loads_nothing_heavy() -> None:
    heavy = "import sys; loaded = {'torch', 'numba', 'numpy'} & set(sys.modules); assert not loaded, loaded"
    program = f"from cli.main import main\ntry: main(['quantize', '--help'])\nfinally: {heavy}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in ("--ram", "--bits", "--mix", "--resident", "--calibration", "--delete-source", "--report"):
        assert option in done.stdout
