"""The trellis launch against its NumPy definition, to the last bit."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numba import set_num_threads

from quant import aligned, trellis_moe
from quant.rotation import signs
from quant.scales import to_bits
from quant.trellis import TRELLIS, layout, matrix_bytes, planes

NAMES = list(TRELLIS)


def random_matrix(name: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Random bits with sane scales."""
    blob = rng.integers(0, 256, matrix_bytes(name, rows, columns), np.uint8)
    for plane in planes(name, blob, layout(rows, columns)):
        scales = rng.uniform(1e-4, 1e-3, plane.scales.shape).astype(np.float32)
        plane.scales[:] = to_bits(scales)
    return blob


def random_layer(formats: list[tuple[str, str]], hidden: int, intermediate: int, rng: np.random.Generator):
    """Experts of a layer and their blobs."""
    blobs = [
        np.concatenate(
            [random_matrix(first, 2 * intermediate, hidden, rng), random_matrix(second, hidden, intermediate, rng)]
        )
        for first, second in formats
    ]
    offsets = np.cumsum([0] + [len(blob) for blob in blobs])
    data = aligned.empty((int(offsets[-1]),))
    data[:] = np.concatenate(blobs)
    pair = signs(1, 2, "gate_up", hidden), signs(1, 2, "down", intermediate)
    return trellis_moe.experts(data, offsets[:-1], formats, pair), blobs


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.sampled_from([(64, 32), (576, 128), (2048, 96), (96, 160), (1088, 64)]),
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), min_size=3, max_size=5),
    st.integers(1, 11),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_equals_reference(shape, formats, tokens, threads, together, seed) -> None:
    rng = np.random.default_rng(seed)
    hidden, intermediate = shape
    layer, blobs = random_layer(formats, hidden, intermediate, rng)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    ids = np.stack([rng.choice(len(formats), 2, replace=False) for _ in range(tokens)])
    weights = rng.random((tokens, 2)).astype(np.float32)
    expected = trellis_moe.moe_reference(layer, blobs, formats, x, ids, weights)
    set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trellis_moe, "SEPARATE", 0 if together else 1 << 26)
        found = trellis_moe.moe(layer, x, ids, weights)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(found, expected)
