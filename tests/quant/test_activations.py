import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from quant import activations


@njit
def encode_all(x, out):
    for t in range(x.shape[0]):
        activations.encode_token(x, out, t)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_kernel_equals_definition(seed: int, tokens: int, groups: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, 32 * groups)) * size).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = 0
    expected, found = activations.encode(x), activations.zeros(tokens, 32 * groups)
    encode_all(x, found)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_error_is_at_most_half_a_step() -> None:
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    code = activations.encode(x)
    decoded = code.values[:, :96] * np.repeat(code.scales[:, :3], 32, axis=1)
    step = np.repeat(code.scales[:, :3], 32, axis=1)
    assert (np.abs(decoded - x) <= 0.5001 * step).all()


def test_zeros_encode_to_zeros() -> None:
    code = activations.encode(np.zeros((1, 64), np.float32))
    assert not code.values.any() and not code.scales.any() and not code.sums.any()
