import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant import scales


def nearest(groups: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Squared error of each group under its scale, in float64."""
    steps = scales.from_bits(bits).astype(np.float64)[:, None]
    return ((np.rint(groups / steps).clip(-8, 7) * steps - groups) ** 2).sum(1)


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1))
def test_rounding_is_bfloat16s(values: list[float]) -> None:
    x = np.array(values, np.float32)
    bits = scales.to_bits(x)
    np.testing.assert_array_equal(bits.view(np.int16), torch.from_numpy(x).bfloat16().view(torch.int16).numpy())
    np.testing.assert_array_equal(scales.from_bits(bits), torch.from_numpy(x).bfloat16().float().numpy())


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.sampled_from([1e-10, 1.0, 1e10]))
def test_search_finds_the_best_of_its_candidates(seed: int, count: int, size: float) -> None:
    groups = (np.random.default_rng(seed).standard_normal((count, 32)) * size).astype(np.float32)
    found = nearest(groups, scales.search(groups, np.ones((1, 32), np.float32)))
    largest = np.abs(groups).max(1)
    tried = [nearest(groups, scales.to_bits(largest * np.float32(part / 7))) for part in scales.CANDIDATES]
    np.testing.assert_allclose(found, np.min(tried, axis=0), rtol=1e-4)


def test_importance_is_per_weight_and_may_be_shared() -> None:
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((40, 32)).astype(np.float32)
    groups[:, 0] *= 10
    weights = np.ones((1, 32), np.float32)
    weights[0, 0] = 0  # the outlier may be clipped for nothing
    shared = scales.search(groups, weights)
    np.testing.assert_array_equal(shared, scales.search(groups, np.repeat(weights, 40, axis=0)))
    assert (scales.from_bits(shared) < scales.from_bits(scales.search(groups, np.ones_like(weights)))).any()


def test_zeros_get_a_scale() -> None:
    assert (scales.from_bits(scales.search(np.zeros((3, 32), np.float32), np.ones((1, 32), np.float32))) > 0).all()
