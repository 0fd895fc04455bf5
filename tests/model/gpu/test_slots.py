"""A model whose experts are split between a card and the host, however many the card holds and whoever they are."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hybrid import Kimi
from hybrid.checkpoint import open_checkpoint
from hybrid.errors import KimiError
from hybrid.memory.expert_cache import ExpertCache
from hybrid.memory.expert_store import ExactExperts, PackedExperts, load_experts
from hybrid.memory.hardware import Gpu, Hardware, probe
from hybrid.memory.kv_cache import KVCache
from hybrid.model.batch import Batch, Segment
from hybrid.model.gpu import Card
from hybrid.model.gpu.slots import CardSlots
from hybrid.model.moe import MoE, of_pairs
from hybrid.model.transformer import Transformer
from tests.model.gpu.test_model import divergence, load, logits, pack  # noqa: F401  (a fixture)

KINDS = ("trellis", "int4")


@pytest.fixture
def path(request: pytest.FixtureRequest, tiny: Path, pack: Path) -> Path:  # noqa: F811
    """A pack of several trellis formats, and the released model."""
    return {"trellis": pack, "int4": tiny}[request.param]


def with_cache(path: Path, card: Card, slots: int) -> tuple[Transformer, ExpertCache]:
    """The model and its cache, filled with the first experts of each layer."""
    model = load(path, dataclasses.replace(card))
    sizes = [block.ffn.experts.expert_bytes.max() for block in model.blocks if isinstance(block.ffn, MoE)]
    cache = ExpertCache(model.config, slots, int(max(sizes)), card.device)
    model.keep_hot(cache)
    cache.fill(np.zeros_like(model.stats.counts))
    return model, cache


def with_a_card() -> Hardware:
    """This machine, whose memory is a card's as well where there is none."""
    here = probe()
    return here if here.gpus else dataclasses.replace(here, gpus=(Gpu("none", 8 << 30, 8 << 30, "8.9"),))


@pytest.mark.parametrize("path", KINDS, indirect=True)
@pytest.mark.parametrize("slots", [0, 5, 1000])
def test_a_split_model_is_the_same_model(path: Path, card: Card, slots: int) -> None:
    model, cache = with_cache(path, card, slots)
    found, expected = logits(model, card.device), logits(load(path, None), torch.device("cpu"))
    assert divergence(expected, found) < 1e-2
    counters = cache.counters
    assert counters.hits + counters.misses > 0
    assert (counters.hits == 0) == (slots == 0) and (counters.misses == 0) == (slots == 1000)
    assert (model.stats.expert_bytes == 0) == (slots == 1000), "the host reads what the card does not hold"
    assert model.stats.expert_bytes == counters.ram_bytes


@pytest.mark.parametrize("path", KINDS, indirect=True)
def test_it_adapts_while_it_runs(path: Path, card: Card) -> None:
    """The same few tokens again and again: their experts come in, and every step says what the host alone says."""
    model, cache = with_cache(path, card, 6)
    plain = load(path, None)
    caches = [
        KVCache(model.config, 64, dtype=torch.bfloat16, device=each) for each in (card.device, torch.device("cpu"))
    ]
    rates, pairs = [], []
    for step in range(8):
        batch = Batch(torch.tensor([7 + step % 2]), (Segment(0, 1, step, (0,)),))
        cache.counters.reset()
        pairs.append([m.head(m.forward(batch, kv)).cpu() for m, kv in zip((plain, model), caches, strict=True)])
        rates.append(cache.counters.hit_rate)
    assert divergence(*(torch.cat(each) for each in zip(*pairs, strict=True))) < 1e-2
    assert sum(rates[-3:]) > sum(rates[:3])


@pytest.mark.parametrize("path", KINDS, indirect=True)
def test_a_layer_of_experts_in_slots(path: Path, card: Card) -> None:
    """Through replaced slots: what is here gives its share, what is not gives none."""
    with open_checkpoint(path) as checkpoint:
        layers = {
            layer: load_experts(checkpoint, layer, exact=False, dtype=torch.bfloat16, threads=1)
            for layer in checkpoint.config.moe_layers
        }
        config = checkpoint.config
    cache = ExpertCache(config, 3, max(int(each.expert_bytes.max()) for each in layers.values()), card.device)
    slots = CardSlots(card, cache)
    on_card = {layer: slots.add(layer, experts) for layer, experts in layers.items()}
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((3, config.hidden_size), np.float32))
    for turn in range(6):
        layer = config.moe_layers[turn % len(config.moe_layers)]
        ids = torch.from_numpy(np.stack([rng.permutation(config.n_routed_experts)[:2] for _ in x]))
        for _ in range(6):  # until some who were missed are here
            cache.step()
            for each, experts in layers.items():
                cache.note(each, ids.numpy() if each == layer else np.zeros(0, np.int64), experts.expert_bytes)
        places, weights = cache.split(layer, ids), torch.rand(ids.shape)
        here = places < cache.count
        assert bool(here.any()) and on_card[layer] is not None
        found = on_card[layer].forward(*(each.to(card.device) for each in (x, places, weights))).cpu()
        expected = of_pairs(layers[layer], x, ids, weights, here)
        assert float((found - expected).norm() / expected.norm()) < 2e-2, "int8 activations against fp16 ones"
    assert cache.counters.evictions > 0


def test_experts_that_no_kernel_takes_stay_on_the_host(tiny: Path, card: Card) -> None:
    with open_checkpoint(tiny) as checkpoint:
        cache = ExpertCache(checkpoint.config, 2, 64, card.device)
        assert CardSlots(card, cache).add(1, ExactExperts(lambda i: (x := torch.zeros(1, 1), x, x), np.ones(8))) is None
        moved = PackedExperts(lambda *arguments: np.zeros(1), np.ones(8))
        assert CardSlots(card, cache).add(1, moved) is None


@pytest.mark.parametrize("path", KINDS, indirect=True)
def test_a_loaded_model_uses_the_card(path: Path, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, slots, seen = list(range(9)), 6, []
    with Kimi.load(path, ctx=64, threads=1, device="cpu") as kimi:
        expected = kimi.logits(ids)
        assert kimi.expert_report()["cache"] is None
    monkeypatch.setattr("hybrid.model.reside.find_card", lambda device: (card, ""))
    monkeypatch.setattr("hybrid.model.reside.probe", with_a_card)
    options = {"ctx": 64, "threads": 1, "device": card.device.type, "gpu_experts": slots}
    with Kimi.load(path, **options, on_progress=seen.append) as kimi:
        report = kimi.expert_report()["cache"]
        assert report["slots"] == slots and report["hits"] == report["uploads"] == 0, "what loading did is not counted"
        assert divergence(expected, kimi.logits(ids)) < 1e-2
        report = kimi.expert_report()["cache"]
        assert report["hits"] > 0 and report["misses"] > 0 and 0 < report["hit_rate"] < 1
    cards = [progress for progress in seen if progress.stage == "card"]
    assert cards[-1].done == cards[-1].total == slots * report["slot_bytes"]


def test_kernels_that_fail_at_real_size_are_given_up(
    tiny: Path, card: Card, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They passed their check with small matrices, and the model's own are too much: it is loaded again."""

    def failing(*arguments: object, **constants: object) -> None:
        raise KimiError("The GPU kernel multiply_groups failed: out of resources.", "Try --device cpu.")

    answers = iter([(Card(card.device, failing), ""), (None, "")])
    with monkeypatch.context() as patch:
        patch.setattr("hybrid.model.reside.find_card", lambda device: next(answers))
        patch.setattr("hybrid.model.reside.probe", with_a_card)
        kimi = Kimi.load(tiny, ctx=64, threads=1, device=card.device.type, gpu_experts=6)
    with kimi:
        assert "out of resources. Everything is loaded again, for the CPU." in caplog.messages[0]
        assert kimi.expert_report()["cache"] is None
        found = kimi.logits([1, 2, 3])
    with Kimi.load(tiny, ctx=64, threads=1, device="cpu") as plain:
        assert torch.equal(found, plain.logits([1, 2, 3]))


@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.integers(1, 5), st.integers(0, 2**32))
def test_every_pair_is_computed_once(tiny: Path, tokens: int, seed: int) -> None:
    """Any half of the pairs and the other half are the whole."""
    with open_checkpoint(tiny) as checkpoint:
        experts = load_experts(checkpoint, 1, exact=False, dtype=torch.bfloat16, threads=1)
        config = checkpoint.config
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, config.hidden_size, generator=generator)
    choice = torch.rand(tokens, config.n_routed_experts, generator=generator).topk(config.num_experts_per_tok)
    chosen = torch.rand(choice.indices.shape, generator=generator) < 0.5
    whole = experts.forward(x, choice.indices, choice.values)
    halves = (of_pairs(experts, x, choice.indices, choice.values, which) for which in (chosen, ~chosen) if which.any())
    torch.testing.assert_close(sum(halves), whole, rtol=1e-5, atol=1e-5)
