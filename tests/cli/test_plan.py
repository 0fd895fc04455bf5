"""`kimi-local plan`: what it prints, as JSON too, and how it ends."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cli import main as program
from cli.plan import parse_bandwidth
from hybrid import Kimi, SamplingParams
from hybrid.chat.message import Message
from hybrid.errors import UsageError

BOX = ("--vram", "24GiB", "--ram", "256GiB", "--ram-bw", "75GB/s", "--disk-bw", "7GB/s", "--cores", "16")


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """What one command prints to stdout and stderr; it must end with `code`."""
    with pytest.raises(SystemExit) as ended:
        program.main(["plan", *map(str, arguments)])
    out = capsys.readouterr()
    assert ended.value.code == code, out.err
    return out.out, out.err


def test_the_first_five_lines_answer(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "k2.5", *BOX, "--gpu", "4090", "--ctx", "32k")
    lines = out.splitlines()
    assert err == "" and lines[0] == "k2.5 fits. Context 32k, KV cache bf16."
    assert lines[1].startswith("Experts  2.00 bits per weight, 236.2 GiB (253.7 GB): ") and "all in RAM" in lines[1]
    assert lines[2].startswith("VRAM     24.0 of 24.0 GiB: resident int8 11.3, expert slots ")
    assert lines[3].startswith("RAM      252.3 of 256.0 GiB: experts 236.2, system 10.7, ")
    assert lines[4].startswith("Left     VRAM ") and "(3.9 GB)" in lines[4]
    for words in ("Where every byte lives", "limited by RAM bandwidth", "Also possible", "--experts native"):
        assert words in out
    assert "kimi-local quantize Kimi-K2.5 Kimi-K2.5-pack --bits 2 --resident int8" in out
    assert lines[-1].startswith("Again: kimi-local plan k2.5 --gpu 4090 --vram 25769803776 ")


def test_json_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "k2.5", *BOX, "--ctx", "32k", "--json")[0])
    assert found["fits"] is True and found["experts"]["bpw"] <= 2.0
    assert set(found["experts"]) >= {"bpw", "bytes", "formats"}
    for area in ("vram", "ram", "nvme"):
        assert set(found[area]) >= {"total", "parts"}
        assert found[area]["total"] == sum(found[area]["parts"].values()) <= found[area]["size"]
    predicted = found["predicted"]
    for name in ("decode_tok_s", "prefill_tok_s", "load_s"):
        assert 0 < predicted[f"{name}_low"] <= predicted[name] <= predicted[f"{name}_high"]
        assert predicted[f"{name}_limit"]
    assert found["command"].endswith("kimi-local chat Kimi-K2.5-pack --ctx 32768")
    assert found["nearest"] == [] and len(found["alternatives"]) >= 3


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--experts", "native"),
        ("--ram", "128GiB"),
        ("--vram", "0", "--kv", "fp8"),
        ("--kv", "int8"),
        ("--ram", "190GiB"),
        ("--ram-budget", "100GiB", "--gpu-experts", "500"),
    ],
)
def test_a_plan_can_be_made_again(capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    first = json.loads(run(capsys, "k2.5", *BOX, *options, "--json")[0])
    words = shlex.split(first["reproduce"])
    assert words[:2] == ["kimi-local", "plan"]
    second = json.loads(run(capsys, *words[2:], "--json")[0])
    for key in ("fits", "experts", "vram", "ram", "nvme", "predicted", "command", "reproduce"):
        assert second[key] == first[key], key


def test_what_does_not_fit_ends_with_3_after_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--vram", "0", "--ram", "16GiB", "--ram-bw", "50", "--cores", "8")
    out, err = run(capsys, "k2.5", *small, code=3)
    assert "k2.5 does not fit: " in out.splitlines()[0] and "What would fit" in out and "Run:" not in out
    assert err.startswith("error: k2.5 does not fit: ") and err.count("\n") == 1 and "Try --ctx 2048" in err
    found = json.loads(run(capsys, "k2.5", *small, "--json", code=3)[0])
    assert found["fits"] is False and found["command"] == "" and found["predicted"]["decode_tok_s"] is None
    assert found["nearest"][0]["cost"] and found["lacks"] > 0


def test_native_experts_are_on_the_drive(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "k2-thinking", *BOX, "--experts", "native")
    assert "4.50 bits per weight, 531.6 GiB (570.8 GB): int4_g32; on NVMe, RAM a cache" in out
    assert "NVMe 531.6 GiB (570.8 GB), 45% cached" in out


def test_what_the_card_holds_counts(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "k2.5", *BOX, "--ram", "190GiB")
    assert "RAM and VRAM together hold them, each in one place" in out
    assert re.search(r"chat Kimi-K2.5-pack --ctx 32768 --ram-budget \d+ --gpu-experts 1022\n", out)
    out, _ = run(capsys, "k2.5", *BOX, "--ram", "128GiB")
    assert re.search(r"NVMe .*, 65% cached, 4% on the card\n", out)
    found = json.loads(run(capsys, "k2.5", *BOX, "--ram-budget", "100GiB", "--gpu-experts", "500", "--json")[0])
    assert found["experts"]["exclusive"] and found["experts"]["vram_slots"] == 500
    assert found["ram"]["parts"]["expert slots"] <= 100 << 30


def test_directories_and_files_are_read(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    for model in (tiny, tiny / "config.json"):
        found = json.loads(run(capsys, model, "--vram", "0", "--ram", "8GiB", "--ram-bw", "30", "--json")[0])
        assert found["fits"] and found["command"] == f"kimi-local chat {tiny} --ctx {found['ctx']}"
        assert list(found["experts"]["formats"]) == ["int4_g32"]


def test_a_pack_is_planned_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    pack = tmp_path / "pack"
    with pytest.raises(SystemExit):
        program.main(["quantize", str(tiny), str(pack), "--mix", "gate_up=trellis1_5,down=trellis3"])
    capsys.readouterr()
    found = json.loads(run(capsys, pack, "--vram", "0", "--ram", "8GiB", "--ram-bw", "30", "--json")[0])
    assert found["experts"]["formats"] == {"trellis1_5+trellis3": 16} and found["resident"] == "bf16"
    assert found["command"].startswith(f"kimi-local chat {pack} ")
    files = sum(file.stat().st_size for file in pack.glob("experts-*.bin"))
    assert found["experts"]["bytes"] == files


def test_a_run_is_shown_beside_its_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = tmp_path / "run.json"
    record.write_text('{"rss": 250e9, "decode_tok_s": 9.5, "load_s": 60, "other": null}')
    out, _ = run(capsys, "k2.5", *BOX, "--compare", record)
    assert "Predicted and achieved" in out and "250.0 GB" in out
    found = json.loads(run(capsys, "k2.5", *BOX, "--compare", record, "--json")[0])["compared"]
    assert set(found) == {"rss", "decode_tok_s", "load_s"} and found["decode_tok_s"]["achieved"] == 9.5
    record.write_text("[1]")
    assert "is no record of a run" in run(capsys, "k2.5", *BOX, "--compare", record, code=2)[1]


def test_the_last_run_is_shown_beside_its_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert f"No run of {tiny} is on record" in run(capsys, tiny, *BOX, "--ctx", "64", "--compare", "last", code=2)[1]
    with Kimi.load(tiny, ctx=128, keep_stats=True) as kimi:
        for _ in kimi.reply([Message("user", "Hello, hello, hello.")], SamplingParams(max_tokens=20)):
            pass
        record = kimi.run_record()
    rows = json.loads(run(capsys, tiny, *BOX, "--ctx", "64", "--compare", "last", "--json")[0])["compared"]
    assert {name: row["achieved"] for name, row in rows.items() if name != "rss"} == {
        name: value for name, value in record.items() if name != "rss"
    }
    assert {"rss", "load_s", "prefill_tok_s", "decode_tok_s", "ram_gbps"} == rows.keys()
    assert rows["rss"]["achieved"] == pytest.approx(record["rss"], rel=0.1)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--ram", "lots"], 2, "'lots' is no amount of memory"),
        (["--disk-bw", "fast"], 2, "'fast' is no bandwidth"),
        (["--gpu", "Voodoo 2"], 2, "is no card known here"),
        (["--ctx", "300k"], 2, "not possible"),
        (["--ctx", "many"], 2, "no number of tokens"),
        (["--experts", "q4_K"], 2, "'q4_K' is no format of experts"),
        (["--experts", "0.3"], 2, "too few"),
        (["--kv", "int4"], 2, "--kv"),
        (["--compare", "/nowhere.json"], 1, "No such file"),
    ],
)
def test_what_cannot_be_is_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], code: int, words: str
) -> None:
    out, err = run(capsys, "k2.5", *BOX, *options, code=code)
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_models_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "There is no model k3 here" in run(capsys, "k3", *BOX, code=4)[1]
    assert "config.json" in run(capsys, tmp_path, *BOX, code=4)[1]
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in run(capsys, tmp_path, *BOX, code=4)[1]


@pytest.mark.parametrize(
    ("text", "gbps"), [("7GB/s", 7.0), ("7", 7.0), ("3500 MB/s", 3.5), ("1.2TB/s", 1200.0), (None, None)]
)
def test_bandwidths(text: str | None, gbps: float | None) -> None:
    assert parse_bandwidth(text) == gbps


@pytest.mark.parametrize("text", ["", "0", "-3", "7GiB", "GB/s"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(UsageError):
        parse_bandwidth(text)


def test_help_names_the_options_and_loads_nothing_heavy() -> None:
    heavy = "import sys; loaded = {'torch', 'numba', 'numpy'} & set(sys.modules); assert not loaded, loaded"
    code = f"from cli.main import main\ntry: main(['plan', '--help'])\nfinally: {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in ("--vram", "--ram", "--disk-bw", "--ram-bw", "--pcie-bw", "--experts", "--compare", "--measure"):
        assert option in done.stdout
