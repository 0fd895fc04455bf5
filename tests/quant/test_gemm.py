"""Many tokens of one expert through decoded matrices, against the definitions in NumPy."""

from collections.abc import Iterator

import numba
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from quant import gemm, int4_g32, kernels, trellis, trellis_moe
from quant.gemm import BF16, FP32, Gemm, Layer, sides
from quant.rotation import rotate
from quant.scales import from_bits, to_bits
from quant.swiglu import swiglu
from tests.quant.test_trellis_moe import random_layer

FORMATS = ["int4_g32", *trellis.TRELLIS]
FEW = settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
SHAPES = [(64, 32), (96, 160), (576, 128), (2112, 96), (128, 1088)]  # the last two: more than a piece


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are too small to share out: more threads only wait for each other."""
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


def random_experts(name: str, hidden: int, intermediate: int, rng: np.random.Generator) -> Layer:
    """Three of them, one format."""
    if name != "int4_g32":
        return random_layer([(name, name)] * 3, hidden, intermediate, rng)[0]
    layer = kernels.Experts(int4_g32.empty(3, 2 * intermediate, hidden), int4_g32.empty(3, hidden, intermediate))
    for stack in layer:
        blocks = stack.blocks
        blocks[:] = rng.integers(0, 256, blocks.shape, np.uint8)
        scales = rng.uniform(0.01, 0.03, (*blocks.shape[:-1], 32)).astype(np.float32)
        blocks[..., 512:] = to_bits(scales).view(np.uint8)
    return layer


def meaning(layer: Layer, expert: int) -> tuple[np.ndarray, np.ndarray]:
    """gate_up and down of an expert in fp32, by the slow definitions, in the basis of their inputs as rotated."""
    if isinstance(layer, kernels.Experts):
        gate_up, down = (stack.blocks[expert] for stack in layer)
        hidden, intermediate = 32 * len(down), 16 * len(gate_up)
        return int4_g32.decode(gate_up, hidden), int4_g32.decode(down, intermediate)
    first, second = (_trellis_meaning(layer.data, matrix, expert) for matrix in (layer.gate_up, layer.down))
    return first, second


def _trellis_meaning(data: np.ndarray, matrix: trellis_moe.Matrices, expert: int) -> np.ndarray:
    halves = tuple(matrix.planes[expert, :, 0].tolist())
    name = next(n for n, codes in trellis.TRELLIS.items() if tuple(c.halves for c in (*codes, *codes))[:2] == halves
                or (len(codes) == 1 and (codes[0].halves, 0) == halves))  # fmt: skip
    start = int(matrix.planes[expert, 0, 1])
    blob = data[start : start + trellis.matrix_bytes(name, matrix.rows, matrix.columns)]
    return trellis.decode(name, blob, matrix.rows, matrix.columns)


def expected(layer: Layer, expert: int, x: np.ndarray) -> np.ndarray:
    """Everything decoded, products in fp64."""
    gate_up, down = (matrix.astype(np.float64) for matrix in meaning(layer, expert))
    turn = isinstance(layer, trellis_moe.TrellisExperts)
    products = ((rotate(x, layer.gate_up.sign) if turn else x) @ gate_up.T).reshape(len(x), -1, 2, 16)
    gate, up = (products[:, :, part].reshape(len(x), -1) for part in (0, 1))
    inner = swiglu(gate.astype(np.float32), up.astype(np.float32))
    return (rotate(inner, layer.down.sign) if turn else inner) @ down.T


def bf16_product(x: np.ndarray, w: np.ndarray, out: np.ndarray) -> None:
    out[:] = to_bits(from_bits(x) @ from_bits(w))


PRODUCTS = {FP32: gemm.numpy_product, BF16: bf16_product}


def relative(found: np.ndarray, target: np.ndarray) -> float:
    return float(np.linalg.norm(found - target) / np.linalg.norm(target))


@pytest.mark.parametrize("name", FORMATS)
@FEW
@given(st.sampled_from(SHAPES), st.sampled_from([FP32, BF16]), st.integers(0, 2**32))
def test_decoded_pieces_are_the_definition(name: str, shape: tuple[int, int], dtype: np.dtype, seed: int) -> None:
    """To the bit: in fp32 the definition's own values, in bf16 the nearest to each."""
    layer, many = random_experts(name, *shape, np.random.default_rng(seed)), Gemm(dtype=dtype)
    for side, matrix in zip(sides(layer, 1), meaning(layer, 1), strict=True):
        for number, first in side.pieces():
            found = many.decode(layer, side, number).T
            rows = matrix[first : first + side.piece]
            assert np.array_equal(found[: len(rows)], rows if dtype == FP32 else to_bits(rows))
    assert many._buffer.size <= gemm.buffer_bytes(*shape, dtype)


@pytest.mark.parametrize("name", FORMATS)
@FEW
@given(st.sampled_from(SHAPES), st.integers(1, 40), st.sampled_from([FP32, BF16]), st.integers(0, 2**32))
def test_adds_what_the_expert_makes_of_its_tokens(
    name: str, shape: tuple[int, int], count: int, dtype: np.dtype, seed: int
) -> None:
    """Few tokens, many, and none; other rows keep what they had. Closer than int8 activations come."""
    rng = np.random.default_rng(seed)
    layer, many = random_experts(name, *shape, rng), Gemm(PRODUCTS[dtype], dtype)
    x = rng.standard_normal((50, shape[0])).astype(np.float32)
    y, weights = np.ones_like(x), rng.random(count).astype(np.float32)
    tokens = np.sort(rng.permutation(50)[:count])
    many.add(layer, 2, x, tokens[:0], weights[:0], y)
    assert (y == 1).all()
    y[tokens] = 0
    many.add(layer, 2, x, tokens, weights, y)
    assert (np.delete(y, tokens, axis=0) == 1).all()
    target = weights[:, None] * expected(layer, 2, x[tokens])
    assert relative(y[tokens], target) < (1e-5 if dtype == FP32 else 1e-2)
    kernel = trellis_moe.moe if isinstance(layer, trellis_moe.TrellisExperts) else kernels.moe
    rounded = kernel(layer, x[tokens], np.full((count, 1), 2), weights[:, None])
    assert relative(y[tokens], target) < relative(rounded, target)


def test_formats_may_differ_between_the_two_matrices() -> None:
    rng = np.random.default_rng(0)
    layer, _ = random_layer([("trellis1", "trellis3"), ("trellis2_5", "trellis1_5")], 256, 128, rng)
    x = rng.standard_normal((9, 256)).astype(np.float32)
    for expert in (0, 1):
        y = np.zeros_like(x)
        Gemm().add(layer, expert, x, np.arange(9), np.ones(9, np.float32), y)
        assert relative(y, expected(layer, expert, x)) < 1e-5


@pytest.mark.parametrize("name", ["int4_g32", "trellis2_5"])
def test_threads_do_not_change_a_bit(name: str) -> None:
    rng = np.random.default_rng(3)
    layer, x = random_experts(name, 576, 128, rng), rng.standard_normal((9, 576)).astype(np.float32)
    found = []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        found.append(np.zeros_like(x))
        Gemm().add(layer, 1, x, np.arange(9), np.ones(9, np.float32), found[-1])
    assert np.array_equal(*found)


@pytest.mark.parametrize("name", ["int4_g32", "trellis2"])
def test_damaged_scales_show(name: str) -> None:
    """NaN comes out as NaN in bf16 too, instead of some number."""
    layer = random_experts(name, 64, 32, np.random.default_rng(0))
    if isinstance(layer, kernels.Experts):
        layer.gate_up.blocks[0, 0, 0, 0, 512:514] = 0xFF
    else:
        start = int(layer.gate_up.planes[0, 0, 1])
        layer.data[start : start + 2] = 0xFF
    for dtype in (FP32, BF16):
        y = np.zeros((3, 64), np.float32)
        Gemm(PRODUCTS[dtype], dtype).add(
            layer, 0, np.ones((3, 64), np.float32), np.arange(3), np.ones(3, np.float32), y
        )
        assert np.isnan(y).any()


@pytest.mark.parametrize("formats", [("int4_g32", "int4_g32"), ("trellis2", "trellis2_5")])
def test_a_sample_can_be_multiplied_by_both_paths(formats: tuple[str, str]) -> None:
    layer, x = gemm.sample(formats, 128, 64), np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    y = np.zeros_like(x)
    Gemm().add(layer, 0, x, np.arange(5), np.ones(5, np.float32), y)
    kernel = trellis_moe.moe if isinstance(layer, trellis_moe.TrellisExperts) else kernels.moe
    assert 0 < relative(kernel(layer, x, np.zeros((5, 1), np.int64), np.ones((5, 1), np.float32)), y) < 0.05
