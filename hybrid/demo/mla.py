"""Grouped-query attention as multi-head latent attention.

The normed input itself is the latent (identities for q_a_proj and the latent half of kv_a_proj; it has RMS 1, so their
norms do nothing), and kv_b_proj computes every head's value from it.

Keys go into MLA's single shared rope key, all groups side by side: with g groups it is g times as wide as a head, and
its frequency grid, theta^(-2j / (g * head_dim)), is g times as fine. Pair i of a head wants theta^(-2i / head_dim),
which is slot j = g * i. The groups share slots g*i .. g*i + g-1, so one gets it exactly and the others turn slower, by
up to theta^(-2(g-1) / (g * head_dim)). The group in which the pair carries most energy takes the exact slot. With one
group nothing is approximate.
"""

import math

import torch
from torch import Tensor

from hybrid.demo.llama import LlamaConfig, LlamaLayer

QK_NOPE_HEAD_DIM = 16  # zeros: all of the scores comes from the rope part


def pair_energy(config: LlamaConfig, layer: LlamaLayer, x: Tensor) -> Tensor:
    """[groups, head_dim / 2]: mean |q|^2 |k|^2 of each rotating pair over normed inputs x [tokens, hidden]."""
    groups, pairs = config.num_key_value_heads, config.head_dim // 2
    q = (x @ layer.q.T).view(len(x), groups, -1, pairs, 2).pow(2).sum(-1).mean((0, 2))
    k = (x @ layer.k.T).view(len(x), groups, pairs, 2).pow(2).sum(-1).mean(0)
    return q * k


def rope_slots(energy: Tensor) -> Tensor:
    """[groups, pairs]: the slot of the wide rope key that each group's pair takes; energy as of `pair_energy`."""
    groups, pairs = energy.shape
    rank = energy.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return groups * torch.arange(pairs) + rank


def mla_weights(config: LlamaConfig, layer: LlamaLayer, energy: Tensor) -> dict[str, Tensor]:
    """Tensors of a self_attn block, named as in checkpoints, for a layer whose norm weights are 1."""
    hidden, head_dim, groups = config.hidden_size, config.head_dim, config.num_key_value_heads
    heads, nope, rope = config.num_attention_heads, QK_NOPE_HEAD_DIM, groups * head_dim
    slots = rope_slots(energy)
    q = torch.zeros(heads, nope + rope, hidden)
    q[:, nope:] = _spread(layer.q.view(heads, head_dim, hidden), slots.repeat_interleave(heads // groups, 0), rope)
    q *= math.sqrt((nope + rope) / head_dim)  # the scores will be divided by the wide key's root, not the head's
    k = _spread(layer.k.view(groups, head_dim, hidden), slots, rope).sum(0)
    kv_b = torch.zeros(heads, nope + head_dim, hidden)
    kv_b[:, nope:] = layer.v.view(groups, head_dim, hidden).repeat_interleave(heads // groups, 0)
    return {
        "q_a_proj.weight": torch.eye(hidden),
        "q_a_layernorm.weight": torch.ones(hidden),
        "q_b_proj.weight": q.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat((torch.eye(hidden), k)),
        "kv_a_layernorm.weight": torch.ones(hidden),
        "kv_b_proj.weight": kv_b.flatten(0, 1),
        "o_proj.weight": layer.o,
    }


def _spread(weight: Tensor, slots: Tensor, rope: int) -> Tensor:
    """weight [heads, head_dim, hidden] -> [heads, rope, hidden], pair i of head h at slot slots[h, i], else zero."""
    wide = weight.new_zeros(len(weight), rope // 2, 2, weight.shape[2])
    wide[torch.arange(len(weight))[:, None], slots] = weight.unflatten(1, (-1, 2))
    return wide.flatten(1, 2)
