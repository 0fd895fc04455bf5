"""Experts with many tokens: who is decoded for torch, that the sum is right, and that RAM and drive give the same."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.checkpoint import Checkpoint, open_checkpoint, open_pack
from hybrid.checkpoint.tiny import make_tiny
from hybrid.config import ModelConfig
from hybrid.convert import Settings, quantize
from hybrid.convert.plan import INT4
from hybrid.memory import many as module
from hybrid.memory.expert_store import LayerExperts, first_formats, load_experts
from hybrid.memory.many import LEAST, MOST, NEVER, ManyTokens, crossing, product
from hybrid.memory.slots import slot_bytes
from hybrid.memory.tiers import NvmeTier
from quant.gemm import BF16, FP32, Gemm, buffer_bytes
from quant.scales import from_bits, to_bits

EXPERTS, K, LAYER, HIDDEN = 8, 3, 1, 128
MADE = {"mixed": Settings(bits=2.4), "int4": Settings(mix=INT4)}
NAMES = ["mixed", "int4", "released"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The matrices are too small to share out: more threads only wait for each other."""
    before = numba.get_num_threads(), torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    numba.set_num_threads(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("many")
    source = make_tiny(root / "source", config={"num_experts_per_tok": K, "moe_intermediate_size": 96})
    return {"released": source} | {name: quantize(source, root / name, s, threads=1) for name, s in MADE.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where crossovers are remembered."""
    path = tmp_path / "many-tokens.json"
    monkeypatch.setattr(module, "_path", lambda: path)
    yield path


@pytest.fixture(scope="module")
def config(models: dict[str, Path]) -> ModelConfig:
    with open_checkpoint(models["released"]) as checkpoint:
        return checkpoint.config


def load(checkpoint: Checkpoint, many: ManyTokens | None, exact: bool = False) -> LayerExperts:
    dtype = torch.float32 if exact else torch.bfloat16
    return load_experts(checkpoint, LAYER, exact=exact, dtype=dtype, threads=1, many=many)


def step(tokens: int, seed: int, used: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids and weights of tokens that mostly choose the first of `used` experts, and no other."""
    rng = np.random.default_rng(seed)
    odds = 0.5 ** np.arange(used)
    ids = np.stack([rng.choice(used, K, replace=False, p=odds / odds.sum()) for _ in range(tokens)])
    x, weights = rng.standard_normal((tokens, HIDDEN), np.float32), rng.random((tokens, K), np.float32)
    return torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(weights)


def relative(found: torch.Tensor, target: torch.Tensor) -> float:
    return float((found - target).norm() / target.norm())


# -- the sum ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_chunk_comes_closer_to_all_decoded(models: dict[str, Path], name: str, dtype: np.dtype) -> None:
    """Some experts with few tokens, some with many, some with none; all of them and only the crowded ones by torch."""
    with open_checkpoint(models[name]) as checkpoint:
        exact, kernels = load(checkpoint, None, exact=True), load(checkpoint, None)
        case = step(40, 0, used=6)
        target, least = exact.forward(*case), {}
        for from_tokens in (1, 20):
            many = ManyTokens(checkpoint.config, from_tokens)
            many.gemm = Gemm(product, dtype)
            least[from_tokens] = relative(load(checkpoint, many).forward(*case), target)
            assert many.gemm._buffer.size <= buffer_bytes(HIDDEN, 96, dtype)
        assert least[1] < (1e-5 if dtype == FP32 else 1e-2)
        assert least[1] < least[20] < relative(kernels.forward(*case), target) < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_tokens_whose_experts_have_few_keep_their_bits(models: dict[str, Path], name: str) -> None:
    with open_checkpoint(models[name]) as checkpoint:
        x, ids, weights = step(40, 1)
        ids[:20] = torch.tensor([5, 6, 7])  # 20 tokens each, and more than that for the first ones
        ids[20:] = torch.tensor([0, 1, 2])
        many = ManyTokens(checkpoint.config, 21)
        expected = load(checkpoint, None).forward(x, ids, weights)
        ids[:1] = torch.tensor([0, 5, 6])
        found = load(checkpoint, many).forward(x, ids, weights)
        assert torch.equal(found[1:20], expected[1:20])
        assert not torch.equal(found[20:], expected[20:])


@pytest.mark.parametrize("name", NAMES)
def test_never_is_never(models: dict[str, Path], name: str) -> None:
    with open_checkpoint(models[name]) as checkpoint:
        case = step(200, 2)
        found = load(checkpoint, ManyTokens(checkpoint.config, NEVER)).forward(*case)
        assert torch.equal(found, load(checkpoint, None).forward(*case))


@pytest.mark.parametrize("name", NAMES)
def test_ram_that_has_only_some(models: dict[str, Path], name: str) -> None:
    pinned = np.arange(EXPERTS) >= 4
    with open_checkpoint(models[name]) as checkpoint:
        case = step(40, 3, used=4)
        every, some = (
            load_experts(checkpoint, LAYER, exact=False, dtype=torch.bfloat16, threads=1, pinned=p,
                         many=ManyTokens(checkpoint.config, 15))
            for p in (None, pinned)
        )  # fmt: skip
        assert torch.equal(every.forward(*case), some.forward(*case))


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=6)
@given(slots=st.sampled_from([K, 5, EXPERTS]), tokens=st.integers(1, 60), from_tokens=st.sampled_from([1, 9, 25]))
def test_the_drive_gives_the_bits_of_ram(
    models: dict[str, Path], name: str, slots: int, tokens: int, from_tokens: int
) -> None:
    with open_pack(models[name]) as pack:
        many = ManyTokens(pack.config, from_tokens)
        case = step(tokens, tokens)
        with closing(NvmeTier(pack, slots * slot_bytes(pack), many=many)) as tier:
            found = tier.moe(LAYER, *(part.numpy() for part in case))
        assert np.array_equal(found, load(pack, many).forward(*case).numpy())


def test_both_products_of_torch() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((5, 64)).astype(np.float32), rng.standard_normal((64, 32)).astype(np.float32)
    out = np.empty((5, 32), np.float32)
    product(x, w, out)
    assert np.allclose(out, x @ w, atol=1e-4)
    rounded = np.empty((5, 32), np.uint16)
    product(to_bits(x), to_bits(w), rounded)
    assert np.allclose(from_bits(rounded), from_bits(to_bits(x)) @ from_bits(to_bits(w)), rtol=1e-2, atol=1e-2)


# -- from how many on -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((32.0, 128.0), (40.0, 64.0), 43),  # 8 behind, and 0.75 gained by each further token: 32 + 10.67
        ((32.0, 128.0), (20.0, 64.0), LEAST),
        ((32.0, 128.0), (90.0, 138.0), 148),
        ((32.0, 128.0), (90.0, 185.0), NEVER),  # at 5600 tokens
        ((32.0, 128.0), (40.0, 160.0), NEVER),
        ((32.0, 128.0), (30.0, 140.0), NEVER),
    ],
)
def test_crossing(ours: tuple[float, float], theirs: tuple[float, float], expected: int) -> None:
    assert crossing((32, 128), ours, theirs) == expected <= MOST


def test_who_is_chosen(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the crossover of its own formats, in a chunk that matters, and never a step of a few answers."""
    many, formats = ManyTokens(config), [("trellis2", "trellis2"), ("trellis3", "trellis2")] * (EXPERTS // 2)
    crossovers = {formats[0]: 50, formats[1]: NEVER}
    monkeypatch.setattr(many, "_measure", crossovers.__getitem__)
    ids = np.repeat(np.arange(4), [60, 60, 49, 50])[:, None]
    assert many.chosen(formats, ids).size == 0, "so small a model has nothing to gain"
    monkeypatch.setattr(module, "MATTERS", config.expert_params * 219)
    assert many.chosen(formats, ids).tolist() == [0]
    assert many.chosen(formats, ids[:-1]).size == 0
    assert many.chosen([formats[0]] * EXPERTS, ids).tolist() == [0, 1, 3]
    monkeypatch.setattr(module, "MATTERS", 0)
    crossovers[formats[0]] = 1
    assert ManyTokens(config, None).chosen(formats, np.zeros((LEAST - 1, 1), np.int64)).size == 0
    assert ManyTokens(config, 4).chosen(formats, np.array([[0, 1], [0, 2], [0, 3], [0, 1]])).tolist() == [0]


def test_a_crossover_is_measured_once(config: ModelConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, str]] = []

    def measure(many: ManyTokens, formats: tuple[str, str]) -> int:
        measured.append(formats)
        return 77

    monkeypatch.setattr(ManyTokens, "_measure", measure)
    cache.write_text('{"another machine": {"trellis2+trellis2": 5}}')
    for formats in (("trellis2", "trellis2"), ("trellis2", "trellis3"), ("trellis2", "trellis2")):
        assert ManyTokens(config).crossover(formats) == 77
    assert measured == [("trellis2", "trellis2"), ("trellis2", "trellis3")]
    kept = json.loads(cache.read_text())
    assert kept.pop("another machine") == {"trellis2+trellis2": 5}
    assert list(kept.values()) == [{"trellis2+trellis2": 77, "trellis2+trellis3": 77}]
    for damaged in ('{"x', json.dumps({key: 3 for key in kept}), json.dumps({key: {"int4": "x"} for key in kept})):
        cache.write_text(damaged)
        assert ManyTokens(config).crossover(("int4_g32", "int4_g32")) == 77
    cache.unlink()
    cache.mkdir()
    assert ManyTokens(config).crossover(("trellis1", "trellis1")) == 77, "not kept, which nothing depends on"


@pytest.mark.parametrize("formats", [("int4_g32", "int4_g32"), ("trellis1_5", "trellis3")])
def test_measuring_gives_some_number(config: ModelConfig, formats: tuple[str, str]) -> None:
    assert ManyTokens(config)._measure(formats) in {NEVER, *range(LEAST, MOST + 1)}


def test_formats_to_compile_for(models: dict[str, Path], tiny: Path) -> None:
    found = {}
    for name, path in models.items():
        with open_checkpoint(path) as checkpoint:
            found[name] = first_formats(checkpoint)
    assert found["released"] == found["int4"] == ("int4_g32", "int4_g32") and found["mixed"] != found["int4"]
