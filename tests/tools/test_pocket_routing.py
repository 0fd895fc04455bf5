"""What is said of a router, against slow counting; needs no trained model."""

from pathlib import Path

import numpy as np
import pytest
from pocket import routing

from hybrid import Kimi


def trace(seed: int = 0, tokens: int = 40) -> np.ndarray:
    """[tokens, 3 layers, 2 of 10 experts]"""
    rng = np.random.default_rng(seed)
    picks = [[np.sort(rng.choice(10, 2, replace=False)) for _ in range(3)] for _ in range(tokens)]
    return np.array(picks)


def test_shares_are_counted() -> None:
    found = routing.shares(routing.counted(trace(), 10))
    for layer in range(3):
        picks = trace()[:, layer].ravel().tolist()
        assert found[layer].tolist() == pytest.approx([picks.count(expert) / 80 for expert in range(10)])


def test_even_and_uneven_use() -> None:
    even, one = np.ones((1, 10), np.int64), np.eye(1, 10, dtype=np.int64)
    assert routing.entropy(even) == pytest.approx([1]) and routing.entropy(one) == pytest.approx([0])
    assert routing.busiest(even) == pytest.approx([0.1]) and routing.busiest(one) == pytest.approx([1])
    assert routing.apart(even / 10, even / 10) == 0 and routing.apart(one, np.eye(1, 10, 3)) == 1


def test_experts_kept_from_token_to_token() -> None:
    picks = trace()
    pairs = [(set(a), set(b)) for t in range(39) for a, b in zip(picks[t], picks[t + 1], strict=True)]
    assert routing.kept(picks) == pytest.approx(np.mean([len(a & b) / 2 for a, b in pairs]))


def test_choices_are_those_the_model_makes(tiny: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 300, routing.WINDOW + 9).tolist()
    with Kimi.load(tiny, threads=1) as kimi:
        kimi.logits(ids[: routing.WINDOW])
        counts = kimi.expert_report()["counts"]
        found = routing.chosen(kimi._checkpoint, ids)
        assert found.shape == (routing.WINDOW, 2, 4)
        share = routing.shares(routing.counted(found, kimi.config.n_routed_experts))
        assert (
            np.abs(share - np.array(counts) / (4 * routing.WINDOW)).max() < 0.01
        )  # another order of sums: a few differ


def test_the_trace_file(tmp_path: Path) -> None:
    routing.save_trace({"a": trace(1), "b": trace(2)}, tmp_path / "new" / "trace.npz", 30)
    with np.load(tmp_path / "new" / "trace.npz") as file:
        assert file["domains"].tolist() == ["a", "b"] and file["starts"].tolist() == [0, 15]
        np.testing.assert_array_equal(file["chosen"][15:], trace(2)[:15])
