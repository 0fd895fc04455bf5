"""A whole model beside llama.cpp's: the arithmetic always, a tiny run where llama-cpp-python is installed."""

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import pytest
import torch

from hybrid import Kimi
from hybrid.checkpoint.tiny import make_tiny
from hybrid.errors import DoesNotFit, KimiError
from tests.tools.sizes import SMALL

TOOLS = Path(__file__).parents[2] / "tools"
QUICK = ["--threads=1", "--rounds=2", "--tokens=3", "--prompt=10", "--ceiling-mb=8"]

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python, needed by this tool only, is not installed"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(TOOLS))
    threads = numba.get_num_threads(), torch.get_num_threads()
    yield importlib.import_module("bench_decode")
    numba.set_num_threads(threads[0])
    torch.set_num_threads(threads[1])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "model", config=SMALL)


def never(prompt: list[int], steps: int) -> Any:
    raise AssertionError("not run")


def test_summary_takes_medians_and_the_fastest_reading(bench: ModuleType) -> None:
    ours = bench.Program("kimi-local", "int4_g32", 4.5, 2_000_000_000, never)
    theirs = bench.Program("llama.cpp", "iq2_xxs", 2.0625, 1_000_000_000, never)
    rounds = [
        bench.Round(20.0, (4.0, 2.0), (60.0, 30.0)),
        bench.Round(40.0, (10.0, 8.0), (90.0, 60.0)),
        bench.Round(30.0, (5.0, 4.0), (70.0, 100.0)),
    ]
    result = bench.summary([bench.Duel(ours, theirs, rounds)], 25.0, 2)

    assert json.loads(json.dumps(result)) == result
    assert result["ceiling_gbps"] == 40.0
    at = {"threads": 2}
    assert result["rows"] == [
        {"program": "kimi-local", "format": "int4_g32", "bpw": 4.5, "tg_tok_s": 5.0, "pp_tok_s": 70.0}
        | {"bytes_per_token": 2_000_000_000, "share": 0.25}
        | at,
        {"program": "llama.cpp", "format": "iq2_xxs", "bpw": 2.062, "tg_tok_s": 4.0, "pp_tok_s": 60.0}
        | {"bytes_per_token": 1_000_000_000, "share": 0.1}
        | at,
    ]
    ratios = {"tg": 1.25, "tg_range": [1.25, 2.0], "pp": 1.5, "pp_range": [0.7, 2.0]}
    assert result["ratios"] == [{"against": "iq2_xxs"} | ratios], "of neighbours, not of medians"


def test_programs_take_turns_on_the_same_tokens(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[int], int]] = []

    def program(name: str, seconds: float) -> Any:
        def run(prompt: list[int], steps: int) -> Any:
            calls.append((name, prompt, steps))
            return bench.Seconds(seconds, 2 * seconds)

        return bench.Program(name, "", 0.0, 0, run)

    monkeypatch.setattr(bench, "read_gbps", lambda *_: 9.0)
    options = bench.parse(["--model", "M", "--tokens=6", "--prompt=20"])
    found = next(bench.rounds(program("A", 1.0), program("B", 0.5), 50, options))

    assert found == bench.Round(9.0, (3.0, 6.0), (20.0, 40.0))
    assert [(name, len(prompt), steps) for name, prompt, steps in calls] == [
        ("A", 8, 6),
        ("B", 8, 6),
        ("A", 20, 0),
        ("B", 20, 0),
    ]
    assert calls[0][1] == calls[1][1] and calls[2][1] == calls[3][1]


def test_ours_counts_the_bytes_of_a_token(bench: ModuleType, model: Path) -> None:
    options = bench.parse(["--model", str(model), *QUICK])
    with bench.our_program(options) as ours:
        assert (ours.format, ours.bpw) == ("int4_g32", 4.5)
        seconds = ours.run([1, 2, 3], 2)
        assert seconds.prompt > 0 and seconds.decode > 0
    with Kimi.load(model, threads=1, ctx=16) as kimi:
        config = kimi.config
        assert ours.bytes_per_token == kimi._engine.model.resident_bytes + config.expert_bytes_per_token()


def test_what_does_not_fit_is_said_with_the_sizes(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"llama\.cpp's model needs 1000000\.0 GB of disk .* GB are free"):
        bench.require_room(10**15, str(tmp_path))


@pytest.mark.parametrize("arguments", ["--rounds 0", "--threads 0", "--scratch /nowhere/at/all"])
def test_options_that_cannot_be_meant_are_one_line(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert bench.main(["--model", "M", *arguments.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_llama_cpp_one_line_says_what_to_install(
    bench: ModuleType, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.main(["--model", str(model), *QUICK]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "pip install llama-cpp-python" in err


@needs_llama
@pytest.mark.parametrize("flags", [[], ["--no-repack", "--openmp-default"]], ids=["as it is", "no repacking"])
def test_a_tiny_run_ends_in_one_json_object(
    bench: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    arguments = ["--model", str(model), "--types", "iq2_xxs,q4_K", "--scratch", str(scratch), *QUICK]
    assert bench.main([*arguments, *flags]) == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)

    assert first.startswith("ceiling: ")
    assert any("--repack 0" in line for line in lines) == bool(flags)
    assert set(result) == {"ceiling_gbps", "rows", "ratios"}
    keys = {"program", "format", "bpw", "threads", "tg_tok_s", "pp_tok_s", "bytes_per_token", "share"}
    assert [set(row) for row in result["rows"]] == [keys] * 3
    assert [(row["program"], row["format"]) for row in result["rows"]] == [
        ("kimi-local", "int4_g32"),
        ("llama.cpp", "iq2_xxs"),
        ("llama.cpp", "q4_K"),
    ]
    assert all(row[key] > 0 for row in result["rows"] for key in keys - {"program", "format"})
    assert [ratio["against"] for ratio in result["ratios"]] == ["iq2_xxs", "q4_K"]
    assert list(scratch.iterdir()) == [], "the files are gone"


@needs_llama
def test_a_model_that_llama_cpp_cannot_load_is_one_line(
    bench: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    options = bench.parse(["--model", "M", *QUICK])
    with bench.closing(bench.Llama(tmp_path / "broken.gguf", options)) as llama, pytest.raises(KimiError, match="load"):
        llama.loaded_bytes()
    assert llama.process.poll() is not None


@needs_llama
def test_a_crash_of_llama_cpp_is_one_line(bench: ModuleType, tmp_path: Path, model: Path) -> None:
    options = bench.parse(["--model", str(model), *QUICK])
    with bench.their_program("q4_0", bench.shared_config(options), options) as theirs:
        llama = theirs.run.__self__
        llama.process.kill()
        llama.process.wait()
        with pytest.raises(KimiError, match="ended"):
            theirs.run([1, 2], 1)


@needs_llama
@pytest.mark.parametrize("arguments", ["--types q9_Z", "--types iq2_xxs,q4_1"])
def test_unknown_types_are_one_line(
    bench: ModuleType, model: Path, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert bench.main(["--model", str(model), *QUICK, *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1


@needs_llama
def test_a_model_without_experts_is_one_line(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = make_tiny(tmp_path / "dense", config={**SMALL, "first_k_dense_replace": 3})
    assert bench.main(["--model", str(dense), *QUICK]) == 2
    assert "no routed experts" in capsys.readouterr().err
