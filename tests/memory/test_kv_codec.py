"""Reduced rows against their definition spelled out in NumPy, and how far they may be from what was kept."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid.memory.known import known
from hybrid.memory.kv_codec import decode, encode
from hybrid.memory.kv_format import REDUCED, KVFormat, kv_bytes

SHAPES = [(512, 64), (32, 8), (40, 18), (18, 16), (7, 2)]
E4M3 = np.array([0] + [m * 2.0**-9 for m in range(1, 8)] + [(8 + m) * 2.0**e for e in range(-9, 6) for m in range(8)])
E4M3 = E4M3[:127]  # the last one is NaN


def formats() -> list[KVFormat]:
    return [KVFormat(kind, *shape) for kind in REDUCED for shape in SHAPES]


def rows(count: int, format: KVFormat, seed: int = 0) -> torch.Tensor:
    """Tiles of very different size, and zeros among the values."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((count, format.rank + format.rope)) * 10.0 ** draw.uniform(-6, 4, (count, 1))
    return torch.from_numpy((values * (draw.random(values.shape) > 0.1)).astype(np.float32))


def reference(x: torch.Tensor, format: KVFormat) -> np.ndarray:
    """What `decode` is to give after `encode`, a value at a time."""
    out = x.clone()
    for row in out:
        for first in range(0, format.rank, format.tile):
            tile = row[first : first + format.tile].numpy()
            tile[:] = nearest(tile, format.kind)
    out[:, format.rank :] = x[:, format.rank :].bfloat16().float()
    return out.numpy()


def nearest(tile: np.ndarray, kind: str) -> np.ndarray:
    levels = np.arange(128.0) if kind == "int8" else E4M3
    scale = np.maximum(np.abs(tile).max() / np.float32(levels[-1]), np.finfo(np.float32).tiny)
    distance = np.abs(np.abs(tile / scale)[:, None].astype(np.float64) - levels)
    closest = distance == distance.min(axis=1, keepdims=True)
    even = np.arange(len(levels)) % 2 == 0
    chosen = np.where(closest.sum(axis=1) > 1, (closest & even).argmax(axis=1), closest.argmax(axis=1))
    return np.copysign(levels[chosen].astype(np.float32) * scale, tile)


@pytest.mark.parametrize("format", formats(), ids=str)
def test_the_definition(format: KVFormat) -> None:
    x = rows(40, format)
    stored = encode(x, format)
    assert stored.dtype == torch.uint8 and stored.shape == (40, format.row_bytes)
    assert format.row_bytes % 4 == 0 and not stored[:, format.row_bytes - format.padding :].any()
    found = decode(stored, format, torch.float32)
    np.testing.assert_array_equal(found.numpy(), reference(x, format))
    assert torch.equal(encode(x, format), stored)
    assert torch.equal(encode(x[7:9], format), stored[7:9]), "a row does not depend on its neighbours"


@pytest.mark.parametrize("format", formats(), ids=str)
@pytest.mark.parametrize("count", [1, 3, 2000])
def test_kernel_and_torch_decode_alike(format: KVFormat, count: int) -> None:
    """torch's way, which is the one of other devices, is taken for fp64."""
    stored = encode(rows(count, format, seed=1), format)
    exact = decode(stored, format, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        found = decode(stored, format, dtype)
        assert found.dtype == dtype and found.shape == exact.shape and torch.equal(found, exact.to(dtype))


def test_every_code() -> None:
    """Signs, subnormals and all; of fp8 but for NaN, which is never written."""
    for kind, kept in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        format = KVFormat(kind, 256, 2)
        codes = torch.arange(256, dtype=torch.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0
        stored = torch.zeros(1, format.row_bytes, dtype=torch.uint8)
        stored[0, : format.rotated_at] = torch.tensor([1.0, 0.5]).view(torch.uint8)
        stored[0, format.codes_at : format.codes_at + 256] = codes
        expected = codes.view(kept).float() * torch.tensor([1.0, 0.5]).repeat_interleave(128)
        assert torch.equal(decode(stored, format, torch.float32)[0, :256], expected)
        assert torch.equal(decode(stored, format, torch.bfloat16)[0, :256].float(), expected), "exact in bf16"


VALUES = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True)


@given(st.lists(VALUES, min_size=64, max_size=64), st.sampled_from(REDUCED))
def test_errors_are_bounded(values: list[float], kind: str) -> None:
    format = KVFormat(kind, 48, 16)
    x = torch.tensor([values], dtype=torch.float32)
    found = decode(encode(x, format), format, torch.float32).double()
    latent, kept = x.double()[:, :48].view(3, 16), found[:, :48].view(3, 16)
    largest, tiny = latent.abs().amax(dim=1, keepdim=True), 2.0**-120
    step = largest / 254 if kind == "int8" else torch.maximum(latent.abs() / 16, largest / 448 * 2.0**-10)
    assert ((kept - latent).abs() <= step * (1 + 1e-5) + tiny).all()
    assert ((found - x.double())[:, 48:].abs() <= x.double()[:, 48:].abs() * 2.0**-8 + tiny).all()
    assert (kept[(latent == 0).all(dim=1)] == 0).all()


@pytest.mark.parametrize("kind", REDUCED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_no_number_stays_none_and_hurts_no_other_tile(kind: str, value: float, dtype: torch.dtype) -> None:
    format = KVFormat(kind, 32 + 16, 8)
    x = torch.ones(2, 56)
    x[0, 20] = value
    found = decode(encode(x, format), format, dtype)
    assert found[0, 16:32].isnan().all()
    others = torch.cat((found[0, :16], found[0, 32:], found[1]))
    assert torch.allclose(others, torch.ones_like(others), rtol=1e-6)


def test_zeros_are_zeros() -> None:
    for format in formats():
        assert not decode(encode(torch.zeros(3, format.rank + format.rope), format), format, torch.bfloat16).any()


def test_bytes_of_a_row() -> None:
    config: Any = known("k2.5").config
    sizes = {kind: KVFormat.of(config, kind).row_bytes for kind in ("fp32", "bf16", "fp8", "int8")}
    assert sizes == {"fp32": 2304, "bf16": 1152, "fp8": 512 + 4 * 4 + 64 * 2, "int8": 656}
    assert [KVFormat("fp8", rank, 8).tile for rank in (512, 128, 96, 40, 7)] == [128, 128, 32, 8, 1]
    assert kv_bytes(config, 65, "fp8") == 128 * 61 * 656
