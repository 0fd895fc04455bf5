"""Which experts a step is predicted to find where, if it is known how often each was chosen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrid.checkpoint import open_checkpoint
from hybrid.config import ModelConfig
from hybrid.memory import parts
from hybrid.memory.hardware import Gpu, Hardware
from hybrid.memory.known import known, options_for
from hybrid.memory.place import Options, place
from hybrid.memory.plan import make_plan
from hybrid.memory.predict import Work, uses
from hybrid.memory.rates import rates
from hybrid.memory.router_stats import save_counts, stats_file
from hybrid.memory.simulate import EXPECTED, FLAT, SKEWED, Skew, recorded_uses
from hybrid.memory.tiers import hottest

GIB = 1 << 30
K25 = known("k2.5").config
MANY = 1_000_000  # choices, beside which the one that is added to each expert's does not count


def machine(ram: int, vram: int) -> Hardware:
    card = Gpu("4090", vram * GIB, vram * GIB, "8.9")
    return Hardware(kernels="avx512vnni", physical_cores=16, threads=16, ram_total=ram * GIB, gpus=(card,))


def work(counts: np.ndarray | None, ram: int, experts: str = "trellis1_5", slots: int | None = None) -> Work:
    hardware, options = machine(ram, 24), Options(counts=counts, gpu_experts=slots)
    return Work(K25, options, place(K25, hardware, options, parts.uniform(K25, experts)), rates(hardware))


def heat(hot: int, share: float) -> np.ndarray:
    """Counts of K2.5's experts: `hot` in each MoE layer have `share` of all choices, alike, at places that differ."""
    counts = np.zeros((K25.num_hidden_layers, K25.n_routed_experts), np.int64)
    for layer in K25.moe_layers:
        row = np.full(K25.n_routed_experts, MANY * (1 - share) / (K25.n_routed_experts - hot))
        row[np.random.default_rng(layer).permutation(row.size)[:hot]] = MANY * share / hot
        counts[layer] = row
    return counts


@pytest.mark.parametrize(
    ("ram", "tier", "slots", "hot", "share", "hits"),
    [
        (256, "mirrored", 600, 10, 0.5, 8 * 0.5),  # just those that are hot
        (256, "mirrored", 300, 10, 0.5, 8 * 0.25),  # half of them
        (256, "mirrored", 600, 20, 0.9, 8 * 0.45),
        (190, "exclusive", 600, 10, 0.5, 8 * 0.5),
        (190, "exclusive", 900, 10, 0.5, 8 * (0.5 + 0.5 * 5 / 374)),  # the rest of the slots are used evenly
        (128, "nvme", 600, 10, 0.5, 8 * 0.5),
    ],
)
def test_the_hottest_are_on_the_card(ram: int, tier: str, slots: int, hot: int, share: float, hits: float) -> None:
    """In every tier: that is who is pinned or copied there."""
    found = work(heat(hot, share), ram, slots=slots)
    assert found.placement.tier == tier and found.placement.vram_slots == slots
    for skew in (FLAT, EXPECTED, SKEWED):
        used = uses(found, skew)
        assert used.vram.mean() == pytest.approx(hits, rel=0.005)
        assert np.allclose(used.vram + used.ram + used.nvme, 8) and used.vram.size == K25.num_moe_layers


def test_the_drive_has_the_coldest_and_what_stays_is_read_once() -> None:
    found = work(heat(40, 0.8), 128, slots=600)
    slots = found.placement.vram_slots + found.placement.ram_slots
    cold = 1 - slots / K25.num_experts
    assert found.placement.tier == "nvme" and slots > 60 * 40
    for skew in (FLAT, SKEWED):
        expected = (1 - skew.persistence) * 8 * 0.2 * cold * 384 / 344
        assert uses(found, skew).nvme.mean() == pytest.approx(expected, rel=0.01)


def test_as_a_replay_of_the_choices_finds_them() -> None:
    """The obvious way: draw choices at random, and look each up among the experts that `furnish` would pin."""
    rng, k, slots = np.random.default_rng(0), 2, 30
    weights = rng.dirichlet(np.full(32, 0.4), size=5)
    draws = np.array([rng.choice(32, 20_000, p=row) for row in weights])
    counts = np.array([np.bincount(row, minlength=32) for row in draws])
    pinned = np.zeros(counts.shape, bool)
    pinned.flat[hottest(counts, range(5))[:slots]] = True
    hits = k * np.array([pinned[layer, row].mean() for layer, row in enumerate(draws)])
    assert recorded_uses(counts, k, slots, counts.size - slots, 0.3).vram == pytest.approx(hits, rel=0.01)


@pytest.mark.parametrize("skew", [FLAT, EXPECTED])
def test_nothing_recorded_is_as_before(skew: Skew) -> None:
    assumed, empty = (uses(work(counts, 256), skew) for counts in (None, np.zeros((61, 384), np.int64)))
    assert np.array_equal(assumed.vram, empty.vram) and assumed.vram.mean() > 0


def test_a_few_choices_say_little() -> None:
    """One token's choices must not promise that the next one makes the same."""
    counts = np.zeros((K25.num_hidden_layers, K25.n_routed_experts), np.int64)
    counts[np.ix_(K25.moe_layers, range(8))] = 1
    even = 8 * 600 / K25.num_experts
    assert even < uses(work(counts, 256, slots=600), EXPECTED).vram.mean() < 2 * even


def test_hot_experts_on_the_card_make_a_faster_plan() -> None:
    hardware = machine(190, 24)
    speeds = []
    for counts in (None, heat(10, 0.2), heat(10, 0.7)):
        plan = make_plan(K25, hardware, Options(experts="trellis1_5", counts=counts))
        assert plan.predicted is not None and plan.placement.tier == "exclusive"
        assert plan.routing == plan.as_dict()["routing"] == ("assumed" if counts is None else "recorded")
        decode = plan.predicted.decode_tok_s
        assert decode.low <= decode.value <= decode.high
        speeds.append(decode.value)
    assert speeds[2] > 1.3 * speeds[1], "70 % of hits instead of some 20 %"


def test_what_was_recorded_of_a_model_reaches_its_plan(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    box = replace(machine(8, 24), gpus=())
    with open_checkpoint(tiny) as checkpoint:
        config: ModelConfig = checkpoint.config
        counts = np.zeros((config.num_hidden_layers, config.n_routed_experts), np.int64)
        counts[list(config.moe_layers)] = 7
        assert options_for(known(str(tiny)), box).counts is not None and not known(str(tiny)).counts.any()  # type: ignore[union-attr]
        save_counts(stats_file(checkpoint), config, counts)
    assert np.array_equal(options_for(known(str(tiny)), box).counts, counts)  # type: ignore[arg-type]
    assert known("k2.5").counts is None
