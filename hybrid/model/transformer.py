"""The whole text model: embedding, blocks, final norm, head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.checkpoint import Checkpoint
from hybrid.memory.expert_store import load_experts
from hybrid.memory.kv_cache import KVCache
from hybrid.memory.router_stats import RouterStats
from hybrid.model.attention import Attention
from hybrid.model.batch import Batch
from hybrid.model.layers import GatedMLP, Weights, rms_norm
from hybrid.model.moe import MoE
from hybrid.model.rope import Rope
from hybrid.model.router import Router


@dataclass(frozen=True)
class Block:
    """h += attention(norm(h)); h += ffn(norm(h))."""

    input_layernorm: Tensor
    attention: Attention
    post_attention_layernorm: Tensor
    ffn: GatedMLP | MoE


@dataclass(frozen=True)
class Placement:
    """Where the resident weights live and in what precision; `exact` experts multiply full-precision activations."""

    device: torch.device
    dtype: torch.dtype
    exact: bool
    threads: int


class Transformer:
    """The weights and the arithmetic; knows no text, no requests and no sampling."""

    def __init__(
        self, checkpoint: Checkpoint, placement: Placement, on_layer_loaded: Callable[[int], None] = lambda layer: None
    ) -> None:
        """Reads every weight of `checkpoint`; `on_layer_loaded(n)` is told the number of layers done."""
        config = self.config = checkpoint.config
        self.stats = RouterStats(config)
        self.rope = Rope(config, placement.device)
        tensor, linear = _readers(checkpoint, placement)
        self.embed_tokens = tensor("embed_tokens.weight")
        self.norm = tensor("norm.weight")
        self.lm_head = self.embed_tokens if config.tie_word_embeddings else tensor("lm_head.weight")
        self.blocks: list[Block] = []
        for layer in range(config.num_hidden_layers):
            self.blocks.append(self._load_block(checkpoint, placement, layer, tensor, linear))
            on_layer_loaded(layer + 1)

    def _load_block(
        self, checkpoint: Checkpoint, placement: Placement, layer: int, tensor: Weights, linear: Weights
    ) -> Block:
        prefix = f"layers.{layer}"
        return Block(
            tensor(f"{prefix}.input_layernorm.weight"),
            Attention(self.config, layer, tensor, linear),
            tensor(f"{prefix}.post_attention_layernorm.weight"),
            self._load_moe(checkpoint, placement, layer, linear)
            if self.config.is_moe_layer(layer)
            else GatedMLP.load(linear, f"{prefix}.mlp"),
        )

    def _load_moe(self, checkpoint: Checkpoint, placement: Placement, layer: int, linear: Weights) -> MoE:
        prefix = f"layers.{layer}.mlp"
        router = Router.load(self.config, lambda name: checkpoint.tensor(name).to(placement.device), f"{prefix}.gate")
        experts = load_experts(
            checkpoint, layer, exact=placement.exact, dtype=placement.dtype, threads=placement.threads
        )
        shared = GatedMLP.load(linear, f"{prefix}.shared_experts") if self.config.n_shared_experts else None
        return MoE(layer, router, experts, shared, self.stats)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Hidden states [tokens, hidden] after the last block; extends `kv` by the batch's tokens."""
        cos, sin = self.rope.table(batch.positions())
        h = self.embed_tokens[batch.token_ids]
        eps = self.config.rms_norm_eps
        for layer, block in enumerate(self.blocks):
            batch.on_layer(layer)
            h = h + block.attention.forward(rms_norm(h, block.input_layernorm, eps), batch, kv, cos, sin)
            h = h + block.ffn.forward(rms_norm(h, block.post_attention_layernorm, eps))
        return h

    @torch.inference_mode()
    def head(self, h: Tensor) -> Tensor:
        """Hidden states [rows, hidden] -> logits fp32 [rows, vocab]."""
        return F.linear(rms_norm(h, self.norm, self.config.rms_norm_eps), self.lm_head).float()


def _readers(checkpoint: Checkpoint, placement: Placement) -> tuple[Weights, Weights]:
    """`tensor(name)` and `linear(prefix)`, on the device and in the dtype of the resident weights."""

    def tensor(name: str) -> Tensor:
        return checkpoint.tensor(name).to(placement.device, placement.dtype)

    def linear(prefix: str) -> Tensor:
        return checkpoint.linear(prefix).to(placement.device, placement.dtype)

    return tensor, linear
