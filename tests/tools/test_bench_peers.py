"""The comparison with llama.cpp: its arithmetic always, a tiny run of it where llama-cpp-python is installed."""

import importlib
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest

from cli.bench import FORCED
from hybrid.errors import DoesNotFit, KimiError
from quant.bench import random_layer

TOOLS = Path(__file__).parents[2] / "tools"
TINY = ["--hidden=512", "--intermediate=256", "--gb=0.01", "--threads=1", "--repetitions=2", "--seconds=0.01"]

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python, needed by this tool only, is not installed"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(TOOLS))
    threads = numba.get_num_threads()
    yield importlib.import_module("bench_peers")
    numba.set_num_threads(threads)


def test_summary_takes_medians_over_neighbouring_passes(bench: ModuleType) -> None:
    weights = 8_000_000  # so that one expert of 4 bits is 0.004 GB
    ours, theirs = partial(bench.Side, "int4_g32", 4.5), partial(bench.Side, "q4_K", 4.0)
    slow_then_fast = bench.Duel(
        2, 1, [10.0, 20.0, 40.0], ours([1000.0, 2000.0, 4000.0]), theirs([500.0, 1000.0, 1000.0])
    )
    batched = bench.Duel(2, 4, [20.0] * 3, ours([1000.0] * 3), theirs([250.0] * 3))
    result = bench.summary([batched, slow_then_fast], weights)

    assert json.loads(json.dumps(result)) == result
    assert result["ceiling_gbps"] == {"2": 20.0}
    assert result["ratios"] == [
        {"ours": "int4_g32", "against": "q4_K", "threads": 2, "batch": 4, "gweights_s_ratio": 4.0},
        {"ours": "int4_g32", "against": "q4_K", "threads": 2, "batch": 1, "gweights_s_ratio": 2.0},
    ]
    our_row, their_row, ours_batched, _ = result["rows"]
    at = {"threads": 2, "batch": 1}
    assert our_row == {"program": "kimi-local", "format": "int4_g32", "bpw": 4.5} | at | {
        "gbps": 9.0,
        "gweights_s": 16.0,
        "share": 0.45,
    }
    assert their_row == {"program": "llama.cpp", "format": "q4_K", "bpw": 4.0} | at | {
        "gbps": 4.0,
        "gweights_s": 8.0,
        "share": 0.2,
    }
    assert (ours_batched["gbps"], ours_batched["gweights_s"]) == (4.5, 32.0), "bytes count once, products per token"


def test_a_format_in_two_duels_is_one_row(bench: ModuleType) -> None:
    peer = partial(bench.Side, "iq1_s", 2.0)
    first = bench.Duel(1, 1, [10.0] * 3, bench.Side("trellis1_5", 1.5, [1.0] * 3), peer([1.0, 2.0, 3.0]))
    second = bench.Duel(1, 1, [10.0] * 3, bench.Side("trellis1", 1.0, [1.0] * 3), peer([3.0, 4.0, 5.0]))
    result = bench.summary([first, second], 4_000_000_000)  # of two bits: a gigabyte
    assert [(row["format"], row["gbps"]) for row in result["rows"]] == [
        ("trellis1_5", 0.75),
        ("iq1_s", 3.0),
        ("trellis1", 0.5),
    ]
    assert [(ratio["ours"], ratio["against"]) for ratio in result["ratios"]] == [
        ("trellis1_5", "iq1_s"),
        ("trellis1", "iq1_s"),
    ]


def test_a_ratio_is_of_neighbours_not_of_medians(bench: ModuleType) -> None:
    ours, theirs = bench.Side("int4_g32", 4.5, [3.0, 20.0, 100.0]), bench.Side("q4_0", 4.5, [1.0, 10.0, 100.0])
    duel = bench.Duel(1, 1, [1.0] * 3, ours, theirs)
    assert bench.ratios_of(duel) == [3.0, 2.0, 1.0]
    assert bench.summary([duel], 8)["ratios"][0]["gweights_s_ratio"] == 2.0


def test_passes_take_turns(bench: ModuleType) -> None:
    order: list[str] = []

    def turn(name: str, value: float) -> float:
        order.append(name)
        return value + len(order)

    found = bench.alternate([lambda: turn("A", 0.0), lambda: turn("B", 100.0)], 3)
    assert order == ["A", "B", "A", "B", "A", "B"]
    assert found == [[1.0, 3.0, 5.0], [102.0, 104.0, 106.0]]


def test_every_expert_comes_once_before_any_comes_again(bench: ModuleType) -> None:
    steps = bench.random_order(48, np.random.default_rng(0))
    first, second = (np.concatenate(list(itertools.islice(steps, 6))) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(48))
    assert list(first) != list(second)


def test_a_pass_lasts_its_time_and_does_not_count_the_first_step(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, visited = [0.0], []

    def visit(ids: np.ndarray) -> None:
        visited.append(ids)
        clock[0] += 0.125 if len(visited) > 1 else 5.0

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    assert bench.visits_per_second(visit, itertools.repeat(np.arange(8)), 0.3) == 64.0
    assert len(visited) == 1 + 3


@pytest.mark.parametrize("name", ["int4_g32", "trellis2"])
def test_ours_is_checked_and_a_wrong_kernel_is_not_timed(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    options = bench.parse(TINY)
    layer = random_layer(name, options.gb, np.random.default_rng(0), options.shape)
    bench.check(bench.our_program(layer), options)
    assert f"kimi-local {name}: relative error" in capsys.readouterr().out
    other_token = layer._replace(step=lambda x, ids, weights: layer.step(x[::-1].copy(), ids, weights))
    with pytest.raises(KimiError, match="computes something else"):
        bench.check(bench.our_program(other_token), options)


def test_pairs_are_grouped_by_our_format(bench: ModuleType) -> None:
    found = bench.parse(["--threads=1", "--pairs=trellis2:iq2_xxs,int4_g32:q4_K,trellis2:iq2_xs"]).pairs
    assert found == {"trellis2": ["iq2_xxs", "iq2_xs"], "int4_g32": ["q4_K"]}
    assert list(bench.parse(["--threads=1"]).pairs) == ["trellis2", "trellis1_5", "trellis1", "int4_g32"]


def test_another_instruction_set_starts_the_program_again(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, list[str], str]] = []
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        monkeypatch.setenv(name, "")  # so that it is restored
    monkeypatch.setattr(bench.os, "execv", lambda *command: started.append((*command, os.environ["NUMBA_CPU_NAME"])))
    monkeypatch.setattr(bench.config, "CPU_NAME", None)
    bench.compile_for(None)
    assert started == []
    bench.compile_for("avx2")
    assert started == [(sys.executable, sys.orig_argv, "haswell")]
    assert os.environ["NUMBA_CPU_FEATURES"] == FORCED["avx2"][1]
    monkeypatch.setattr(bench.config, "CPU_NAME", "haswell")
    bench.compile_for("avx2")
    assert len(started) == 1


def test_too_little_memory_is_refused_with_the_sizes(bench: ModuleType) -> None:
    with pytest.raises(DoesNotFit, match=r"needs 2333\d\.\d GB of memory; .* are free"):
        bench.require_memory(10_000)


def test_without_llama_cpp_one_line_says_what_to_install(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.main([]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "pip install llama-cpp-python" in err


@pytest.mark.parametrize(
    "arguments",
    [
        "--gb 0",
        "--hidden 100",
        "--repetitions 0",
        "--threads 100000",
        "--pairs trellis2",
        "--pairs q4_K:trellis2",
    ],
)
def test_sizes_that_cannot_be_meant_are_one_line(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert bench.main(arguments.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


@needs_llama
def test_a_tiny_run_ends_in_one_json_object(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*TINY, "--pairs", "int4_g32:q4_K,trellis2:iq2_xxs", "--batch", "1,2"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)

    assert set(result) == {"ceiling_gbps", "rows", "ratios"}
    assert result["ceiling_gbps"]["1"] > 0
    formats = {(row["program"], row["format"]): row["bpw"] for row in result["rows"]}
    assert formats[("kimi-local", "int4_g32")] == formats[("llama.cpp", "q4_K")] == 4.5
    assert formats[("llama.cpp", "iq2_xxs")] == 2.0625 and 2 < formats[("kimi-local", "trellis2")] < 2.1
    keys = {"program", "format", "bpw", "threads", "batch", "gbps", "gweights_s", "share"}
    for row in result["rows"]:
        assert set(row) == keys
        assert row["gweights_s"] == pytest.approx(row["gbps"] * 8 / row["bpw"] * row["batch"], rel=2e-3)
    settings = {(ratio["ours"], ratio["against"], ratio["threads"], ratio["batch"]) for ratio in result["ratios"]}
    pairs = {("int4_g32", "q4_K"), ("trellis2", "iq2_xxs")}
    assert {(*pair, 1, batch) for pair in pairs for batch in (1, 2)} <= settings
    assert ("int4_g32", "iq2_xxs", 1, 1) not in settings
    assert sum("relative error" in line for line in text) == len(formats)


def test_torch_has_a_ceiling_where_both_paths_are_timed(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = bench.parse([*TINY, "--batch", "1,32,33,40"])
    found = bench.torch_ceiling(options)["ceiling_gflops"]
    assert list(found) == ["1"] and list(found["1"]) == ["33", "40"] and min(found["1"].values()) > 0
    assert capsys.readouterr().out.count("GFLOP/s by torch") == 2


def test_our_other_path_is_checked_too(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = bench.parse([*TINY, "--batch", "40"])
    layer = random_layer("trellis2", options.gb, np.random.default_rng(0), options.shape)
    bench.check(bench.gemm_program(layer), options, [40])
    assert "kimi-local trellis2 gemm: relative error" in capsys.readouterr().out


@needs_llama
def test_a_crowded_batch_is_timed_by_both_paths(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*TINY, "--pairs", "int4_g32:q4_K", "--batch", "1,40"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ceiling_gflops"]["1"]["40"] > 0
    timed = {(ratio["ours"], ratio["batch"]) for ratio in result["ratios"]}
    assert timed == {("int4_g32", 1), ("int4_g32", 40), ("int4_g32 gemm", 40)}


@needs_llama
def test_a_peer_that_reads_other_experts_is_not_timed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench.parse(TINY)
    pattern = bench.random_rows(options.shape, np.random.default_rng(0))
    ggml, fill = bench.Ggml(), bench.GgmlExperts.fill

    def fill_swapped(experts: Any, raw: Any) -> None:
        fill(experts, raw._replace(gate=raw.up, up=raw.gate))

    for layout in ggml.layouts("q4_0", options.shape, bench.ACTIVE):
        with bench.their_program(ggml, layout, pattern, options) as theirs:
            bench.check(theirs, options)
        with monkeypatch.context() as patch:
            patch.setattr(bench.GgmlExperts, "fill", fill_swapped)
            wrong = bench.their_program(ggml, layout, pattern, options)
            with wrong as theirs, pytest.raises(KimiError, match="computes something else"):
                bench.check(theirs, options)


@needs_llama
@pytest.mark.parametrize("arguments", ["--pairs trellis2:q9_Z", "--pairs int4_g32:q4_K --intermediate 320"])
def test_types_llama_cpp_cannot_store_are_one_line(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert bench.main([*TINY, *arguments.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1
