import numpy as np
from numba import njit

from quant import swiglu
from quant.simd import load_f32x16, store_f32x16


@njit
def lanes(gate, up, out):
    for i in range(out.size // 16):
        store_f32x16(out, 64 * i, swiglu.swiglu_lanes(load_f32x16(gate, 64 * i), load_f32x16(up, 64 * i)))


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    special = np.array([0, -0.0, 87, -87, 88, -88, 1e4, -1e4, 1e-30, -1e-30], np.float32)
    gate = np.concatenate([special, (rng.standard_normal(1000 * 16 - special.size) * 10).astype(np.float32)])
    return gate, rng.standard_normal(gate.size).astype(np.float32)


def test_kernel_equals_numpy_bit_for_bit() -> None:
    gate, up = inputs()
    out = np.empty_like(gate)
    lanes(gate, up, out)
    np.testing.assert_array_equal(out.view(np.uint32), swiglu.swiglu(gate, up).view(np.uint32))


def test_close_to_the_true_function() -> None:
    gate, up = inputs()
    exact = gate.astype(np.float64) / (1 + np.exp(np.minimum(-gate.astype(np.float64), 700))) * up
    np.testing.assert_allclose(swiglu.swiglu(gate, up), exact, rtol=1e-6, atol=1e-33)


def test_exp_relative_error() -> None:
    x = np.linspace(-87, 87, 100_001, dtype=np.float32)
    np.testing.assert_allclose(swiglu.exp(x), np.exp(x.astype(np.float64)), rtol=3e-7)
