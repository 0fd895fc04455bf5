"""The rotation against its definition as a matrix, and the kernel against NumPy, to the last bit."""

import numpy as np
import pytest

from quant import rotation


def matrix(columns: int, sign: np.ndarray) -> np.ndarray:
    """H D, spelled out: entry (i, j) of a Sylvester matrix is the parity of i & j."""
    block = rotation.block_size(columns)
    i, j = np.indices((block, block))
    parity = np.array([bin(value).count("1") & 1 for value in range(block)])[i & j]
    return np.kron(np.eye(columns // block), (1 - 2 * parity) / np.sqrt(block)) * sign


@pytest.mark.parametrize("columns", [32, 96, 128, 576, 1024])
def test_is_the_matrix(columns: int) -> None:
    sign = rotation.signs(3, 7, "down", columns)
    x = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
    np.testing.assert_allclose(rotation.rotate(x, sign), x @ matrix(columns, sign).T, atol=1e-5)
    np.testing.assert_allclose(rotation.rotate_back(rotation.rotate(x, sign), sign), x, atol=1e-5)


@pytest.mark.parametrize("columns", [32, 96, 576, 2048, 7168])
def test_kernel_has_the_same_bits(columns: int) -> None:
    sign = rotation.signs(0, 1, "gate_up", columns)
    x = np.random.default_rng(1).standard_normal((3, columns)).astype(np.float32)
    np.testing.assert_array_equal(rotation.rotate_rows(x, sign), rotation.rotate(x, sign))


def test_signs_depend_on_everything() -> None:
    base = rotation.signs(0, 1, "gate_up", 256)
    assert set(base.tolist()) == {-1, 1} and 100 < (base == 1).sum() < 156
    for other in ((1, 1, "gate_up"), (0, 2, "gate_up"), (0, 1, "down")):
        assert 80 < (rotation.signs(*other, 256) == base).sum() < 176
    np.testing.assert_array_equal(rotation.signs(0, 1, "gate_up", 64), base[:64])


def test_outliers_are_spread() -> None:
    x = np.zeros((1, 1024), np.float32)
    x[0, 5] = 32.0
    turned = rotation.rotate(x, rotation.signs(0, 1, "gate_up", 1024))
    np.testing.assert_allclose(np.abs(turned), 1.0, rtol=1e-6)
