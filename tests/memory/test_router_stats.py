"""Counts of experts: recorded, kept, merged, never in the way."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid import Kimi, SamplingParams
from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.tiny import make_tiny
from hybrid.config import ModelConfig
from hybrid.convert import Settings, quantize
from hybrid.memory.router_stats import RouterStats, TierCounters, layer_heat, read_counts, save_counts, stats_file

EXPERTS = 8


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, for this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kimi-local" / "router"


@pytest.fixture(scope="module")
def config(tiny: Path) -> ModelConfig:
    with open_checkpoint(tiny) as checkpoint:
        return checkpoint.config


def some_counts(config: ModelConfig, seed: int) -> np.ndarray:
    counts = np.random.default_rng(seed).integers(0, 9, (config.num_hidden_layers, config.n_routed_experts))
    counts[[layer for layer in range(len(counts)) if layer not in config.moe_layers]] = 0
    return counts


def test_counts_and_bytes(config: ModelConfig) -> None:
    stats = RouterStats(config)
    stats.record(1, np.array([[0, 3], [3, 5]]), np.arange(EXPERTS))
    assert stats.counts[1].tolist() == [1, 0, 0, 2, 0, 1, 0, 0] and stats.expert_bytes == 0 + 3 + 5
    stats.tier = TierCounters(hits=3, misses=1)
    assert stats.tier.hit_rate == 0.75
    stats.reset()
    assert not stats.counts.any() and stats.expert_bytes == 0 and stats.tier == TierCounters()


def test_runs_are_added_up(config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "counts.json"
    runs = [some_counts(config, seed) for seed in range(3)]
    assert not read_counts(path, config).any()
    for run in runs:
        save_counts(path, config, run)
    np.testing.assert_array_equal(read_counts(path, config), sum(runs))
    assert [each.name for each in path.parent.iterdir()] == ["counts.json"], "nothing else is left behind"


def test_a_run_without_choices_writes_nothing(config: ModelConfig, tmp_path: Path) -> None:
    save_counts(tmp_path / "counts.json", config, np.zeros((3, EXPERTS), np.int64))
    assert not list(tmp_path.iterdir())


USELESS = ["", "[]", "{}", '{"counts": {"1": [1, 2]}}', '{"counts": {"9": [0]}}', '{"counts": {"1": null}}']
USELESS += [
    '{"counts": {"1": ["x", 0, 0, 0, 0, 0, 0, 0]}}',
    '{"counts": {"1": [-1, 0, 0, 0, 0, 0, 0, 0]}}',
    '{"counts"',
]


@pytest.mark.parametrize("content", USELESS)
def test_a_file_that_says_nothing_of_use_counts_as_none(config: ModelConfig, tmp_path: Path, content: str) -> None:
    path = tmp_path / "counts.json"
    path.write_text(content)
    assert not read_counts(path, config).any()
    save_counts(path, config, some_counts(config, 1))
    assert read_counts(path, config).any(), "the next run replaces it"


def test_a_place_that_cannot_be_written_is_one_debug_line(
    config: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.DEBUG, logger="hybrid.memory"):
        save_counts(tmp_path / "file" / "counts.json", config, some_counts(config, 1))
    assert sum("is not kept" in record.message for record in caplog.records) == 1
    assert all(record.levelno == logging.DEBUG for record in caplog.records)


def test_a_pack_shares_its_sources_file_and_another_model_does_not(cache: Path, tmp_path: Path) -> None:
    source = make_tiny(tmp_path / "source")
    pack = quantize(source, tmp_path / "pack", Settings(bits=3.0), threads=1)
    other = make_tiny(tmp_path / "other", seed=1)
    files = []
    for path in (source, pack, other):
        with open_checkpoint(path) as checkpoint:
            files.append(stats_file(checkpoint))
    assert files[0] == files[1] != files[2] and files[0].parent == cache


def test_a_closed_model_keeps_its_routing_only_if_asked(cache: Path, tiny: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4)
    for keep, runs in ((False, 0), (True, 1), (True, 2), (False, 2)):
        with Kimi.load(tiny, ctx=64, keep_stats=keep) as kimi:
            list(kimi.generate([5, 6, 7], params))
            counts = kimi._engine.model.stats.counts.copy()
            config, path = kimi.config, stats_file(kimi._checkpoint)
        kimi.close()  # a second time changes nothing
        np.testing.assert_array_equal(read_counts(path, config), runs * counts)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=40))
def test_heat(row: list[int]) -> None:
    heat = layer_heat(np.array(row))
    assert heat.choices == sum(row)
    if not heat.choices:
        return
    hot = sorted(row, reverse=True)[: max(1, round(len(row) / 10))]
    assert math.isclose(heat.hot_share, sum(hot) / sum(row))
    parts = [n / sum(row) for n in row if n]
    assert math.isclose(heat.entropy, -sum(p * math.log2(p) for p in parts), abs_tol=1e-9)
    assert 0 <= heat.entropy <= math.log2(len(row)) + 1e-9
