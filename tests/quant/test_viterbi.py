"""The search against a plain one over the same trellis, and its quality against what the codes can do."""

import numpy as np
import pytest

from quant.codes import CODES, Code, levels
from quant.viterbi import search, search_of, search_reference, split, streams

codes = pytest.mark.parametrize("code", CODES.values(), ids=str)


def reconstructed(code: Code, numbers: np.ndarray) -> np.ndarray:
    found = levels(code, *streams(code, search(code, numbers)))
    return (found.astype(np.float64) - code.zero) * code.unit


@codes
@pytest.mark.parametrize("steps", [64, 80, 128])
def test_equals_reference(code: Code, steps: int) -> None:
    numbers = np.random.default_rng(steps).standard_normal((2, steps)).astype(np.float32)
    numbers[0, 3] = 9.0  # beyond what a level can reach
    np.testing.assert_array_equal(search(code, numbers), search_reference(code, numbers))


@codes
def test_windows_and_streams_agree(code: Code) -> None:
    """The level that the search saw at every step is the level that the bits decode to, across the junction too."""
    numbers = np.random.default_rng(1).standard_normal((20, 72)).astype(np.float32)
    states, tables = search(code, numbers), search_of(code)
    seen = np.stack([table[states] for table in tables.levels], axis=-1).reshape(numbers.shape)
    np.testing.assert_array_equal(levels(code, *streams(code, states)).astype(int) - code.zero, seen)


@codes
def test_error_on_gaussian_numbers(code: Code) -> None:
    numbers = np.random.default_rng(2).standard_normal((400, 128)).astype(np.float32)
    error = np.square(numbers - reconstructed(code, numbers)).mean() / np.square(numbers).mean()
    assert error < {"T10": 0.2850, "T15": 0.1465, "T20": 0.0755}[code.name]


@codes
def test_split_spells_all_twelve_bits(code: Code) -> None:
    e, o = split(code, np.arange(4096, dtype=np.uint16)[:, None])
    assert len(np.unique(np.concatenate((e, o), axis=1), axis=0)) == 4096
