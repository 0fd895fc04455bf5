"""A dense SwiGLU layer as a shared expert and routed experts, exactly.

The neurons of highest energy become the shared expert. The others are dealt to slots, and each slot gets two routed
experts: the same neurons in two different orders. The router scores the two with opposite signs, so for every token
exactly one of them stands above 1/2 and the top-k, with k the number of slots, takes one per slot. Whichever it takes,
the sum is the dense layer; routing weights are equal to within a percent and routed_scaling_factor undoes their norm.

What the router's choice depends on is real: principal directions of the hidden states, with thresholds that make some
experts busy and some idle, so caches and placement see the traffic of a model that routes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid.demo.llama import LlamaLayer

SHARED = 512
SLOTS = 8
# How often the first expert of each slot is chosen: from even to nearly always.
SHARES = torch.linspace(0.5, 0.98, SLOTS).tolist()
# Standard deviation of the router's logits. Small, so that all chosen experts weigh the same: 0.01 moves a weight by
# 0.25 %. The pairs need fp32 scores at any size; in bf16 they would tie.
LOGIT_STD = 0.01


class Split(NamedTuple):
    """Which neurons go where: indices into the dense layer."""

    shared: Tensor  # [SHARED]
    experts: Tensor  # [2 * SLOTS, width]; experts 2s and 2s + 1 hold the same neurons


def neuron_energy(layer: LlamaLayer, a: Tensor) -> Tensor:
    """[intermediate]: mean squared contribution of each neuron to the output, for activations a [tokens, ...]."""
    return a.pow(2).mean(0) * layer.down.pow(2).sum(0)


def split_neurons(energy: Tensor, seed: int, shared: int = SHARED, slots: int = SLOTS) -> Split:
    """The `shared` neurons of highest energy, and the rest dealt at random to `slots` pairs of experts."""
    random = torch.Generator().manual_seed(seed)
    order = energy.argsort(descending=True, stable=True)
    rest = order[shared:]
    dealt = rest[torch.randperm(len(rest), generator=random)].view(slots, -1)
    twins = dealt[:, torch.randperm(dealt.shape[1], generator=random)]
    return Split(order[:shared], torch.stack((dealt, twins), 1).flatten(0, 1))


def neurons(layer: LlamaLayer, chosen: Tensor) -> LlamaLayer:
    """The layer with only the `chosen` neurons, in that order."""
    return layer._replace(gate=layer.gate[chosen], up=layer.up[chosen], down=layer.down[:, chosen])


def router_weights(x: Tensor, shares: list[float] = SHARES, std: float = LOGIT_STD) -> tuple[Tensor, Tensor]:
    """bf16 weight [2 * slots, hidden] and fp32 e_score_correction_bias [2 * slots], from normed x [tokens, hidden].

    Row 2s is a direction in which x varies, orthogonal to the mean of x (so that its logits lie around 0), and row
    2s + 1 its opposite. The bias puts the threshold at the quantile that gives expert 2s its share of x.
    """
    mean = x.mean(0)
    centred = x - mean
    centred = centred - torch.outer(centred @ mean, mean) / mean.dot(mean)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -len(shares) :].T.flip(0)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * largest.sign()  # an eigenvector's sign is a whim of the library
    weight = (directions * (std / (centred @ directions.T).std(0))[:, None]).bfloat16()
    scores = torch.sigmoid(x @ weight.float().T)
    thresholds = torch.stack([scores[:, s].quantile(1 - share) for s, share in enumerate(shares)])
    bias = 0.5 - thresholds
    return torch.stack((weight, -weight), 1).flatten(0, 1), torch.stack((bias, -bias), 1).flatten()
