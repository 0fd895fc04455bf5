"""The comparison with llama.cpp: its arithmetic always, a tiny run of it where llama-cpp-python is installed."""

import importlib
import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest

from hybrid.errors import DoesNotFit, KimiError
from quant import int4_g32

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
    slow_then_fast = bench.Duel(
        "q4_K", 4.0, 2, 1, [10.0, 20.0, 40.0], [1000.0, 2000.0, 4000.0], [500.0, 1000.0, 1000.0]
    )
    batched = bench.Duel("q4_K", 4.0, 2, 4, [20.0] * 3, [1000.0] * 3, [250.0] * 3)
    result = bench.summary([slow_then_fast, batched], ("int4_g32", 4.5), weights)

    assert json.loads(json.dumps(result)) == result
    assert result["ceiling_gbps"] == {"2": 20.0}
    assert result["ratios"] == [
        {"against": "q4_K", "threads": 2, "batch": 1, "gweights_s_ratio": 2.0},
        {"against": "q4_K", "threads": 2, "batch": 4, "gweights_s_ratio": 4.0},
    ]
    ours, theirs, ours_batched, _ = result["rows"]
    at = {"threads": 2, "batch": 1}
    assert ours == {"program": "kimi-local", "format": "int4_g32", "bpw": 4.5} | at | {
        "gbps": 9.0,
        "gweights_s": 16.0,
        "share": 0.45,
    }
    assert theirs == {"program": "llama.cpp", "format": "q4_K", "bpw": 4.0} | at | {
        "gbps": 4.0,
        "gweights_s": 8.0,
        "share": 0.2,
    }
    assert (ours_batched["gbps"], ours_batched["gweights_s"]) == (4.5, 32.0), "bytes count once, products per token"


def test_a_ratio_is_of_neighbours_not_of_medians(bench: ModuleType) -> None:
    duel = bench.Duel("q4_0", 4.5, 1, 1, [1.0] * 3, [3.0, 20.0, 100.0], [1.0, 10.0, 100.0])
    assert bench.ratios_of(duel) == [3.0, 2.0, 1.0]
    assert bench.summary([duel], ("int4_g32", 4.5), 8)["ratios"][0]["gweights_s_ratio"] == 2.0


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


def test_our_int4_rows_mean_what_the_comparison_takes_them_for(bench: ModuleType) -> None:
    matrix = np.random.default_rng(0).standard_normal((32, 128), np.float32)
    packed, scales, decoded = bench.quantize_int4(matrix)
    stack = int4_g32.empty(1, 32, 128)
    int4_g32.pack(packed, scales, stack.blocks[0])
    np.testing.assert_array_equal(int4_g32.decode(stack.blocks[0], 128), decoded)
    assert np.linalg.norm(decoded - matrix) < 0.12 * np.linalg.norm(matrix)


def test_ours_is_checked_and_a_wrong_kernel_is_not_timed(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = bench.parse(TINY)
    ours, memory = bench.our_program(bench.random_rows(options.shape, np.random.default_rng(0)), options)
    assert memory.size >= 1 << 20
    bench.check(ours, options)
    assert "kimi-local int4_g32: relative error" in capsys.readouterr().out
    other_expert = ours._replace(step=lambda x, ids, weights: ours.step(x, (ids + 1) % ours.experts, weights))
    with pytest.raises(KimiError, match="computes something else"):
        bench.check(other_expert, options)


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
    "arguments", ["--gb 0", "--hidden 100", "--repetitions 0", "--threads 100000"], ids=lambda text: text.split()[0]
)
def test_sizes_that_cannot_be_meant_are_one_line(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert bench.main(arguments.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


@needs_llama
def test_a_tiny_run_ends_in_one_json_object(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*TINY, "--types", "q4_K,iq2_xxs", "--batch", "1,2"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)

    assert set(result) == {"ceiling_gbps", "rows", "ratios"}
    assert result["ceiling_gbps"]["1"] > 0
    formats = {(row["program"], row["format"]): row["bpw"] for row in result["rows"]}
    assert formats[("kimi-local", "int4_g32")] == formats[("llama.cpp", "q4_K")] == 4.5
    assert formats[("llama.cpp", "iq2_xxs")] == 2.0625
    keys = {"program", "format", "bpw", "threads", "batch", "gbps", "gweights_s", "share"}
    for row in result["rows"]:
        assert set(row) == keys
        assert row["gweights_s"] == pytest.approx(row["gbps"] * 8 / row["bpw"] * row["batch"], rel=2e-3)
    settings = {(ratio["against"], ratio["threads"], ratio["batch"]) for ratio in result["ratios"]}
    assert {("q4_K", 1, 1), ("q4_K", 1, 2), ("iq2_xxs", 1, 1), ("iq2_xxs", 1, 2)} <= settings
    assert sum("relative error" in line for line in text) == len(formats)


@needs_llama
def test_a_peer_that_reads_other_experts_is_not_timed(bench: ModuleType) -> None:
    options = bench.parse(TINY)
    pattern = bench.random_rows(options.shape, np.random.default_rng(0))
    ggml = bench.Ggml()
    for layout in ggml.layouts("q4_0", options.shape, bench.TOP_K):
        with bench.their_program(ggml, layout, pattern, options) as theirs:
            bench.check(theirs, options)
            swapped = theirs._replace(rows=theirs.rows._replace(gate=theirs.rows.up, up=theirs.rows.gate))
            with pytest.raises(KimiError, match="computes something else"):
                bench.check(swapped, options)


@needs_llama
@pytest.mark.parametrize("arguments", ["--types q9_Z", "--types q4_K --intermediate 320"])
def test_types_llama_cpp_cannot_store_are_one_line(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert bench.main([*TINY, *arguments.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1
