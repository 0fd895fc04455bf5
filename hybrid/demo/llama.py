"""The architecture the demo model comes from: Llama (grouped-query attention, SwiGLU), and its slow forward pass.

Rows of q_proj and k_proj stand in adjacent-pair order, as GGUF files store them: elements 2i and 2i + 1 of a head
rotate together with frequency theta^(-2i / head_dim).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LlamaConfig:
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class LlamaLayer(NamedTuple):
    """fp32 weights [out, in] of one block; the norms [hidden]."""

    input_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class Llama(Protocol):
    """A source of weights, read layer by layer. Embedding and head share one matrix."""

    config: LlamaConfig

    def embedding(self) -> Tensor:
        """fp32 [vocab, hidden]"""

    def final_norm(self) -> Tensor:
        """fp32 [hidden]"""

    def layer(self, i: int) -> LlamaLayer: ...


def frequencies(theta: float, dim: int) -> Tensor:
    """fp32 [dim / 2]: radians per position of each rotating pair, theta^(-2i / dim)."""
    return (theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the adjacent pairs of x [..., tokens, dim] by angles [tokens, dim / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def project_heads(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """x [batch, tokens, hidden] -> [batch, heads, tokens, head_dim]"""
    return (x @ weight.T).unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(config: LlamaConfig, layer: LlamaLayer, x: Tensor) -> Tensor:
    """Causal grouped-query attention on normed x [batch, tokens, hidden]."""
    groups = config.num_key_value_heads
    q = project_heads(x, layer.q, config.num_attention_heads)
    k, v = project_heads(x, layer.k, groups), project_heads(x, layer.v, groups)
    angles = torch.arange(x.shape[1])[:, None] * frequencies(config.rope_theta, config.head_dim)
    repeat = config.num_attention_heads // groups
    k, v = (t.repeat_interleave(repeat, 1) for t in (rotate_pairs(k, angles), v))
    y = F.scaled_dot_product_attention(rotate_pairs(q, angles), k, v, is_causal=True)
    return y.transpose(1, 2).flatten(2) @ layer.o.T


def activations(layer: LlamaLayer, x: Tensor) -> Tensor:
    """The SwiGLU neurons' outputs [..., intermediate] for normed x [..., hidden]."""
    return F.silu(x @ layer.gate.T) * (x @ layer.up.T)


def logits(model: Llama, ids: Tensor) -> Tensor:
    """fp32 [batch, tokens, vocab] for ids [batch, tokens]: the whole model, nothing cached."""
    config, embedding = model.config, model.embedding()
    h = embedding[ids]
    for i in range(config.num_hidden_layers):
        layer = model.layer(i)
        h = h + attention(config, layer, rms_norm(h, layer.input_norm, config.rms_norm_eps))
        h = h + activations(layer, rms_norm(h, layer.post_norm, config.rms_norm_eps)) @ layer.down.T
    return rms_norm(h, model.final_norm(), config.rms_norm_eps) @ embedding.T
