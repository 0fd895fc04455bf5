"""Layout and meaning of the trellis formats, and the encoder that writes them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import activations, trellis
from quant.encode import encode, inputs
from quant.rotation import rotate, rotate_back, signs
from quant.trellis import TRELLIS

NAMES = list(TRELLIS)
SHAPES = [(64, 64), (128, 96), (256, 576), (576, 128), (640, 64), (2064, 64), (4096, 64)]
ERRORS = {"trellis1": 0.285, "trellis1_5": 0.147, "trellis2": 0.076, "trellis2_5": 0.0415, "trellis3": 0.0215}


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 400), st.integers(1, 5), st.integers(0, 2**32))
def test_pack_undoes_unpack(name: str, groups: int, columns: int, seed: int) -> None:
    shape = trellis.layout(16 * groups, 32 * columns)
    assert shape.steps % 8 == 0 and shape.steps <= trellis.LONGEST <= 2 * trellis.SHORTEST
    assert trellis.SHORTEST <= shape.chain * shape.steps <= trellis.LONGEST and shape.padded_rows >= 16 * groups
    blob = np.random.default_rng(seed).integers(0, 256, trellis.matrix_bytes(name, 16 * groups, 32 * columns), np.uint8)
    for plane in trellis.planes(name, blob, shape):
        before = plane.bits.copy()
        e, o = trellis.unpack(plane, shape)
        plane.bits[:] = 0
        trellis.pack(e, o, plane, shape)
        np.testing.assert_array_equal(plane.bits, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_matrix_order(shape: tuple[int, int]) -> None:
    """A lane's sequence runs down its own rows, sixteen apart, panel after panel of its chain."""
    cut = trellis.layout(*shape)
    sequences = np.arange(cut.padded_rows * cut.tiles * 64)
    sequences = sequences.reshape(cut.slabs, cut.tiles, 16 // cut.chain, 64, cut.chain * cut.steps)
    matrix = trellis.to_matrix(sequences, cut)
    assert matrix.shape == (cut.padded_rows, cut.tiles * 64)
    slab, tile, chain, lane = cut.slabs - 1, cut.tiles - 1, 0, 4 * 5 + 2
    rows = slab * 16 * cut.steps + 16 * np.arange(cut.steps) + 5
    expected = [matrix[rows, 64 * tile + 4 * panel + 2] for panel in range(cut.chain)]
    np.testing.assert_array_equal(sequences[slab, tile, chain, lane], np.concatenate(expected))


def test_sizes_of_the_released_experts() -> None:
    """1, 1.5 and 2 bits and 16 bits per row: K2.5's shapes need no padding."""
    for name, bits in zip(NAMES, (1, 1.5, 2, 2.5, 3), strict=True):
        scales = 16 * len(TRELLIS[name])
        assert 8 * trellis.matrix_bytes(name, 4096, 7168) == bits * 4096 * 7168 + scales * 4096
        assert 8 * trellis.matrix_bytes(name, 7168, 2048) == bits * 7168 * 2048 + scales * 7168


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(128, 256), (256, 576), (576, 128), (1024, 96)])
def test_encoded_error_is_the_decoded_one(name: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(shape).astype(np.float32) * rng.uniform(0.01, 0.1, (rows, 1)).astype(np.float32)
    weights[5] = 0  # a row of nothing
    sign = signs(0, 1, "gate_up", columns)
    found = encode(weights, name, sign)
    back = rotate_back(trellis.decode(name, found.blob, rows, columns), sign)
    error = np.square(back - weights).sum() / np.square(weights).sum()
    assert found.error == found.plain_error == pytest.approx(error, rel=1e-3)
    assert error < 1.05 * ERRORS[name] and not back[5].any()
    np.testing.assert_array_equal(encode(weights, name, sign).blob, found.blob)


def test_heavy_tails_cost_nothing() -> None:
    """Student-t weights with a variance per column: rotated, they are as Gaussian as any."""
    rng = np.random.default_rng(3)
    weights = (rng.standard_t(5, (256, 512)) * np.exp(rng.standard_normal(512))).astype(np.float32)
    assert encode(weights, "trellis2", signs(0, 1, "down", 512)).error < 1.03 * ERRORS["trellis2"]


@pytest.mark.parametrize("name", NAMES)
def test_feedback_lowers_the_weighted_error(name: str) -> None:
    rng = np.random.default_rng(1)
    rows, columns = 256, 192
    mixing = rng.standard_normal((columns, columns)) * np.exp(-np.arange(columns) / 30)
    hessian = (mixing @ mixing.T / columns).astype(np.float32)
    weights = rng.standard_normal((rows, columns)).astype(np.float32)
    sign = signs(0, 1, "down", columns)
    plain, fed = encode(weights, name, sign), encode(weights, name, sign, inputs(hessian, sign, rows))
    errors = []
    for found in (plain, fed):
        off = rotate_back(trellis.decode(name, found.blob, rows, columns), sign) - weights
        errors.append(np.einsum("ri,ij,rj", off, hessian, off) / np.einsum("ri,ij,rj", weights, hessian, weights))
    assert fed.error == pytest.approx(errors[1], rel=1e-2)
    assert errors[1] < 0.75 * errors[0] and fed.plain_error > plain.plain_error


@pytest.mark.parametrize("name", NAMES)
def test_product_is_that_of_the_decoded_weights(name: str) -> None:
    rng = np.random.default_rng(2)
    rows, columns = 128, 1088
    sign = signs(0, 1, "gate_up", columns)
    blob = encode(rng.standard_normal((rows, columns)).astype(np.float32), name, sign).blob
    x = rotate(rng.standard_normal((3, columns)).astype(np.float32), sign)
    encoded = activations.encode_spans(x)
    scales = np.repeat(encoded.scales, activations.SPAN, axis=1)[:, :columns]
    exact = (encoded.values[:, :columns] * scales) @ trellis.decode(name, blob, rows, columns).T
    np.testing.assert_allclose(trellis.multiply(name, blob, rows, encoded), exact, rtol=1e-4, atol=1e-3)
