"""Latent attention with one shared rope key against the grouped-query attention it is made from."""

import math

import pytest
import torch
from torch import Tensor

from hybrid.demo.llama import LlamaConfig, attention, frequencies, rotate_pairs
from hybrid.demo.mla import QK_NOPE_HEAD_DIM, mla_weights, pair_energy, rope_slots
from hybrid.demo.rotation import rotate_layer
from tests.demo.random_llama import RandomLlama


def naive_mla(config: LlamaConfig, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """K2.5's attention on normed x [tokens, hidden], formula by formula: full keys and values for every head."""
    heads, nope, rope = config.num_attention_heads, QK_NOPE_HEAD_DIM, config.num_key_value_heads * config.head_dim

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)

    q = (norm(x @ weights["q_a_proj.weight"].T) @ weights["q_b_proj.weight"].T).unflatten(1, (heads, -1))
    latent, k_pe = (x @ weights["kv_a_proj_with_mqa.weight"].T).split((config.hidden_size, rope), 1)
    kv = (norm(latent) @ weights["kv_b_proj.weight"].T).unflatten(1, (heads, -1)).transpose(0, 1)
    angles = torch.arange(len(x))[:, None] * frequencies(config.rope_theta, rope)
    q_nope, q_pe = q.transpose(0, 1).split((nope, rope), -1)
    keys = rotate_pairs(k_pe, angles).T
    scores = q_nope @ kv[..., :nope].transpose(1, 2) + rotate_pairs(q_pe, angles) @ keys
    scores = (scores / math.sqrt(nope + rope)).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ kv[..., nope:]).transpose(0, 1).flatten(1) @ weights["o_proj.weight"].T


def relative_difference(model: RandomLlama, energy_sign: int = 1) -> float:
    """Between both attentions of one layer on random inputs."""
    config = model.config
    layer = rotate_layer(model.layer(0), torch.eye(config.hidden_size))
    x = torch.randn(60, config.hidden_size, generator=torch.Generator().manual_seed(1))
    x *= torch.rsqrt(x.pow(2).mean(-1, keepdim=True))
    expected = attention(config, layer, x[None])[0]
    found = naive_mla(config, mla_weights(config, layer, energy_sign * pair_energy(config, layer, x)), x)
    return float((found - expected).norm() / expected.norm())


def test_one_group_is_exact() -> None:
    assert relative_difference(RandomLlama(num_key_value_heads=1)) < 1e-4


def test_groups_are_exact_when_frequencies_agree() -> None:
    """With theta 1 every pair turns alike: whatever is left would be a mistake in the layout."""
    assert relative_difference(RandomLlama(rope_theta=1.0)) < 1e-4


def test_exact_slots_are_worth_most_to_strong_pairs() -> None:
    model = RandomLlama()
    layer = model.layers[0]
    model.layers[0] = layer._replace(k=layer.k * torch.tensor([0.1, 0.1, 1]).repeat_interleave(16)[:, None])
    assert relative_difference(model) < 0.5 * relative_difference(model, energy_sign=-1)


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_every_pair_has_its_own_slot_and_strong_ones_the_best(groups: int) -> None:
    energy = torch.rand(groups, 8, generator=torch.Generator().manual_seed(groups))
    slots = rope_slots(energy)
    assert sorted(slots.flatten().tolist()) == list(range(groups * 8))
    wanted, wide = frequencies(1000.0, 16), frequencies(1000.0, 16 * groups)
    assert torch.equal(slots // groups, torch.arange(8).expand(groups, 8))
    assert torch.allclose(wide[slots[energy.argmax(0), torch.arange(8)]], wanted)
    assert (wide[slots] / wanted >= 1000.0 ** (-2 * (groups - 1) / (16 * groups)) - 1e-6).all()
