"""The whole text model: embedding, blocks, final norm, head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.checkpoint import Checkpoint
from hybrid.memory.expert_store import load_experts
from hybrid.memory.kv_cache import KVCache
from hybrid.memory.router_stats import RouterStats
from hybrid.model.attention import Attention
from hybrid.model.batch import Batch
from hybrid.model.layers import GatedMLP, Linear, Weights, rms_norm
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
        weights = Weights(checkpoint, placement.device, placement.dtype)
        self.embed_tokens = weights.tensor("embed_tokens.weight")
        self.norm = weights.tensor("norm.weight")
        self.lm_head = Linear(self.embed_tokens) if config.tie_word_embeddings else weights.linear("lm_head")
        self.steps = 0
        self.blocks: list[Block] = []
        for layer in range(config.num_hidden_layers):
            self.blocks.append(self._load_block(weights, placement, layer))
            on_layer_loaded(layer + 1)
        tied = self.embed_tokens.nbytes if config.tie_word_embeddings else 0
        self.resident_bytes = weights.matrix_bytes + tied if placement.device.type == "cpu" else 0

    @property
    def host_bytes(self) -> int:
        """Bytes of weights read from the host's memory so far: experts, and on a CPU the resident weights too."""
        return self.stats.expert_bytes + self.steps * self.resident_bytes

    def _load_block(self, weights: Weights, placement: Placement, layer: int) -> Block:
        prefix = f"layers.{layer}"
        routed = self.config.is_moe_layer(layer)
        return Block(
            weights.tensor(f"{prefix}.input_layernorm.weight"),
            Attention(self.config, layer, weights),
            weights.tensor(f"{prefix}.post_attention_layernorm.weight"),
            self._load_moe(weights, placement, layer) if routed else GatedMLP.load(weights, f"{prefix}.mlp"),
        )

    def _load_moe(self, weights: Weights, placement: Placement, layer: int) -> MoE:
        prefix = f"layers.{layer}.mlp"
        experts = load_experts(
            weights.checkpoint, layer, exact=placement.exact, dtype=placement.dtype, threads=placement.threads
        )
        shared = GatedMLP.load(weights, f"{prefix}.shared_experts") if self.config.n_shared_experts else None
        return MoE(layer, Router.load(self.config, weights, f"{prefix}.gate"), experts, shared, self.stats)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Hidden states [tokens, hidden] after the last block; extends `kv` by the batch's tokens."""
        self.steps += 1
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
        return self.lm_head.forward(rms_norm(h, self.norm, self.config.rms_norm_eps)).float()
