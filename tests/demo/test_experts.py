"""Pairs of experts: exactly one of each is chosen, and whichever it is, the sum is the dense layer."""

import torch
from torch import Tensor

from hybrid.demo import experts as moe
from hybrid.demo.llama import activations
from tests.demo.random_llama import RandomLlama


def inputs(tokens: int, seed: int) -> Tensor:
    """Vectors that vary more in some directions than in others, with a mean, as hidden states do; RMS 1."""
    spread = torch.linspace(0.3, 3, 96)
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(seed)) * spread + spread.flip(0)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))


def choose(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """K2.5's router: top 8 of sigmoid + bias; weights without bias, normed to 8."""
    scores = torch.sigmoid(x @ weight.float().T)
    ids = (scores + bias).topk(moe.SLOTS, dim=-1).indices
    chosen = scores.gather(-1, ids)
    return ids, moe.SLOTS * chosen / chosen.sum(-1, keepdim=True)


def test_exactly_one_of_each_pair_is_chosen() -> None:
    weight, bias = moe.router_weights(inputs(2000, seed=0))
    assert weight.dtype == torch.bfloat16 and bias.dtype == torch.float32
    ids, weights = choose(inputs(5000, seed=1), weight, bias)
    assert torch.equal((ids // 2).sort(-1).values, torch.arange(moe.SLOTS).expand_as(ids))
    assert (weights - 1).abs().max() < 0.03
    used = torch.bincount(ids.flatten(), minlength=2 * moe.SLOTS)[::2] / len(ids)
    assert torch.allclose(used, torch.tensor(moe.SHARES), atol=0.06)


def test_split_deals_every_neuron_once() -> None:
    energy = torch.rand(768, generator=torch.Generator().manual_seed(0))
    split = moe.split_neurons(energy, seed=3)
    first, second = split.experts[::2], split.experts[1::2]
    assert sorted([*split.shared.tolist(), *first.flatten().tolist()]) == list(range(768))
    assert torch.equal(first.sort(-1).values, second.sort(-1).values)
    assert (first != second).float().mean() > 0.9
    assert energy[split.shared].min() >= energy[first].max()
    assert torch.equal(moe.split_neurons(energy, seed=3).experts, split.experts)


def test_shared_and_routed_experts_sum_to_the_dense_layer() -> None:
    layer = RandomLlama().layer(0)
    x = inputs(300, seed=2)
    a = activations(layer, x)
    split = moe.split_neurons(moe.neuron_energy(layer, a), seed=1)
    ids, weights = choose(x, *moe.router_weights(inputs(2000, seed=0)))
    assert len(ids.unique()) > moe.SLOTS, "both variants must take part"

    def expert(chosen: Tensor) -> Tensor:
        part = moe.neurons(layer, chosen)
        return activations(part, x) @ part.down.T

    every = torch.stack([expert(chosen) for chosen in split.experts], 1)
    routed = (every[torch.arange(len(x))[:, None], ids] * weights[..., None]).sum(1)
    dense = a @ layer.down.T
    assert ((expert(split.shared) + routed) - dense).norm() / dense.norm() < 0.01
