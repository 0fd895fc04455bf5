"""The benchmark's own arithmetic, at a shape that takes milliseconds."""

import numpy as np
import pytest

from quant import trellis
from quant.bandwidth import PIECE
from quant.bench import (
    ACTIVE,
    CROWDED,
    FORMATS,
    K25,
    Pass,
    Shape,
    decoded,
    enough,
    measure,
    product_gflops,
    random_layer,
    relative_error,
)
from quant.gemm import Gemm

TINY = Shape(512, 256)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_computes_what_its_weights_mean(name: str, rng: np.random.Generator) -> None:
    layer = random_layer(name, 0.002, rng, TINY)
    assert layer.experts * layer.expert_bytes >= 0.002e9
    assert layer.memory.size >= PIECE and layer.memory.size % PIECE == 0
    assert 0 < relative_error(layer, rng) < 0.03
    assert 0 < relative_error(layer, rng, tokens=5) < 0.03


@pytest.mark.parametrize("name", ["int4_g32", "trellis2_5"])
def test_a_wrong_step_has_a_large_error(name: str, rng: np.random.Generator) -> None:
    layer = random_layer(name, 0.002, rng, TINY)
    unweighted = layer._replace(step=lambda x, ids, weights: layer.step(x, ids, np.ones_like(weights)))
    halves = layer._replace(first=(np.roll(layer.first[0], 16, axis=0), layer.first[1]))  # gate taken for up
    assert relative_error(unweighted, rng) > 0.1 and relative_error(halves, rng) > 0.1


def test_bits_per_weight_count_every_byte(rng: np.random.Generator) -> None:
    assert random_layer("int4_g32", 0.001, rng, TINY).bits == 4.5
    size = sum(trellis.matrix_bytes("trellis1_5", *side) for side in (TINY.gate_up, TINY.down))
    assert random_layer("trellis1_5", 0.001, rng, TINY).bits == 8 * size / (3 * 512 * 256)


def test_shape_of_k25() -> None:
    assert K25.weights == 3 * 7168 * 2048
    assert (K25.gate_up, K25.down) == ((4096, 7168), (7168, 2048))


def test_experts_fill_the_memory_and_two_steps() -> None:
    assert enough(1.0, 300_000_000) == 2 * ACTIVE
    assert enough(1.0, 10_000_000) == 100 and enough(1.0, 9_999_999) == 101


def test_a_pass_visits_every_expert_once(rng: np.random.Generator) -> None:
    layer = random_layer("trellis1", 0.002, rng, TINY)
    visited: list[np.ndarray] = []

    def step(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        assert (ids == ids[0]).all() and x.shape == (3, 512) and weights.shape == ids.shape == (3, ACTIVE)
        visited.append(ids[0])
        return layer.step(x, ids, weights)

    sweep = Pass(layer._replace(step=step), 3, rng)
    assert sweep.seconds(1) > 0
    seen = np.concatenate(visited)
    assert len(set(seen)) == len(seen) == layer.experts // ACTIVE * ACTIVE
    assert sweep.bytes == len(seen) * layer.expert_bytes


def test_measure_yields_the_ceiling_then_a_row_per_setting() -> None:
    said: list[str] = []
    head, *rows = measure(["trellis2", "int4_g32"], 0.003, [1], [1, 2], 1, said.append, TINY)
    assert set(head) == {"ceiling_gbps"} and head["ceiling_gbps"]["1"] > 0
    assert [(row["format"], row["batch"]) for row in rows] == [
        (name, batch) for name in ("trellis2", "int4_g32") for batch in (1, 2)
    ]
    keys = {"path", "format", "bpw", "rows", "cols", "threads", "batch", "gbps", "gweights_s", "share", "rel_err"}
    for row in rows:
        assert set(row) == keys
        assert (row["rows"], row["cols"], row["threads"]) == (256, 512, 1)
        assert row["gbps"] > 0 and row["gweights_s"] > 0 and row["share"] > 0 and 0 < row["rel_err"] < 0.03
    assert {row["path"] for row in rows} == {"kernel"}
    assert said[0] == "preparing 0.003 GB of trellis2" and len(said) == 2 + len(rows)


@pytest.mark.parametrize("name", ["int4_g32", "trellis2_5"])
def test_the_decoding_path_computes_the_same_layer(name: str, rng: np.random.Generator) -> None:
    layer = random_layer(name, 0.002, rng, TINY)
    other = decoded(layer, Gemm())
    assert 0 < relative_error(other, rng, tokens=5) < 1e-5 < relative_error(layer, rng, tokens=5)
    assert product_gflops(layer, Gemm(), 40) > 0


def test_crowded_batches_are_measured_both_ways() -> None:
    given: list[int] = []

    def make(threads: int) -> Gemm:
        given.append(threads)
        return Gemm()

    batches = [1, CROWDED]
    head, *rows = measure(["trellis2"], 0.003, [1], batches, 1, lambda text: None, TINY, make)
    assert head["ceiling_gflops"]["1"].keys() == {str(CROWDED)} and head["ceiling_gflops"]["1"][str(CROWDED)] > 0
    assert [(row["path"], row["batch"]) for row in rows] == [("kernel", 1), ("kernel", CROWDED), ("gemm", CROWDED)]
    assert rows[2]["rel_err"] < 1e-5 < rows[1]["rel_err"] and set(given) == {1}
