"""Bits per expert: never above the budget, as good as trying everything, early layers and down first."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.convert import allocation
from hybrid.convert.allocation import Costs, allocate, expected_error, total_bytes
from hybrid.errors import DoesNotFit

DISTORTION = np.array(list(allocation.DISTORTION.values()))
BITS = np.array([1.0, 1.5, 2.0, 2.5, 3.0])


def costs(gate_up: int, down: int, page: int = 1, distortion: np.ndarray = DISTORTION) -> Costs:
    """Formats of 1 to 3 bits for matrices of so many weights."""
    return Costs(np.stack([gate_up * BITS / 8, down * BITS / 8]).astype(np.int64), distortion, page)


def brute_force(sensitivities: np.ndarray, prices: Costs, budget: int) -> float:
    """The least expected error of all choices within the budget."""
    choices = itertools.product(range(len(prices.distortion)), repeat=sensitivities.size)
    arrays = (np.array(choice).reshape(sensitivities.shape) for choice in choices)
    return min(expected_error(c, sensitivities, prices.distortion) for c in arrays if total_bytes(c, prices) <= budget)


@given(st.integers(0, 2**32 - 1), st.floats(1.0, 3.2))
def test_no_choice_of_its_size_is_better(seed: int, bits: float) -> None:
    rng = np.random.default_rng(seed)
    sensitivities = rng.lognormal(0, 1, (1, 2, 2))
    prices = costs(1600, 800)
    budget = int(bits * 2400 * 2 / 8)
    choice = allocate(sensitivities, prices, budget)
    used = total_bytes(choice, prices)
    assert used <= budget
    best = brute_force(sensitivities, prices, used)
    assert expected_error(choice, sensitivities, DISTORTION) == pytest.approx(best)


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9), st.floats(1.001, 4), st.sampled_from([1, 64, 4096])
)
def test_never_above_the_budget(seed: int, layers: int, experts: int, bits: float, page: int) -> None:
    rng = np.random.default_rng(seed)
    sensitivities = rng.lognormal(0, 2, (layers, experts, 2)) * rng.integers(0, 2, (layers, experts, 2))
    prices = costs(16 * int(rng.integers(1, 9999)), 16 * int(rng.integers(1, 9999)), page)
    cheapest = total_bytes(np.zeros((layers, experts, 2), np.int8), prices)
    budget = int(cheapest * bits)
    choice = allocate(sensitivities, prices, budget)
    assert choice.dtype == np.int8 and choice.shape == (layers, experts, 2)
    assert total_bytes(choice, prices) <= budget
    np.testing.assert_array_equal(choice, allocate(sensitivities, prices, budget))
    with pytest.raises(DoesNotFit, match="at least"):
        allocate(sensitivities, prices, cheapest - 1)


def test_formats_that_are_not_worth_their_bytes_are_left_out() -> None:
    distortion = np.array([0.274, 0.27, 0.0737, 0.08, 0.0201])  # the second and the fourth lie above the hull
    choice = allocate(np.random.default_rng(0).random((5, 20, 2)), costs(16000, 8000, distortion=distortion), 550_000)
    assert set(np.unique(choice)) == {0, 2, 4}


def test_a_generous_budget_buys_the_best() -> None:
    assert (allocate(np.ones((2, 3, 2)), costs(1600, 800), 10**9) == 4).all()


def test_without_data_early_layers_and_down_come_first() -> None:
    layers, experts = 60, 384
    hidden, intermediate = 7168, 2048
    prices = costs(2 * intermediate * hidden, intermediate * hidden, 4096)
    weights = layers * experts * 3 * hidden * intermediate
    began = time.perf_counter()
    choice = allocate(allocation.default_sensitivities(layers, experts), prices, int(1.8 * weights / 8))
    assert time.perf_counter() - began < 2  # 46,080 matrices
    mean_bits = BITS[choice].mean(axis=1)
    assert (np.diff(mean_bits, axis=0) <= 0).all()
    assert (mean_bits[:, 1] >= mean_bits[:, 0]).all() and mean_bits[:, 1].mean() > mean_bits[:, 0].mean() + 0.2
    assert 1.799 < 8 * total_bytes(choice, prices) / weights <= 1.8
    uniform = (0.6 * 0.144 + 0.4 * 0.0737) * allocation.default_sensitivities(layers, experts).sum()
    assert expected_error(choice, allocation.default_sensitivities(layers, experts), DISTORTION) < 0.9 * uniform


def test_frequencies_are_shrunk_to_uniform() -> None:
    found = allocation.frequencies(np.array([[0.0, 100.0, 200.0, 100.0], [0.0, 0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(found, [[0.5, 1.0, 1.5, 1.0], [1, 1, 1, 1]])


def test_busy_and_loud_experts_get_more_bits() -> None:
    counts = np.array([[10.0, 1000.0, 1000.0, 0.0]])
    output = np.array([[1.0, 1.0, 50.0, np.nan]])
    sensitivities = allocation.calibrated_sensitivities(counts, output, np.array([4.0]))[0, :, 0]
    assert sensitivities[2] > sensitivities[1] > sensitivities[0] > 0
    assert np.isfinite(sensitivities).all() and sensitivities[3] > 0  # an unseen expert counts as an ordinary one
