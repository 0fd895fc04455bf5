"""The whole text model: embedding, blocks, final norm, head."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hybrid.checkpoint import Checkpoint
from hybrid.config import ModelConfig
from hybrid.memory.expert_cache import ExpertCache
from hybrid.memory.expert_store import Stored, load_experts
from hybrid.memory.kv_cache import KVCache
from hybrid.memory.kv_format import AUTO
from hybrid.memory.many import ManyTokens
from hybrid.memory.router_stats import RouterStats
from hybrid.memory.tiers import NvmeTier
from hybrid.model.attention import Attention
from hybrid.model.batch import Batch
from hybrid.model.gpu import Card
from hybrid.model.gpu.see import see
from hybrid.model.layers import GatedMLP, Linear, Weights, rms_norm
from hybrid.model.moe import Crossing, Hot, MoE
from hybrid.model.rope import Rope
from hybrid.model.router import Router


@dataclass(frozen=True)
class Block:
    """One layer: h += attention(norm(h)); h += ffn(norm(h))."""

    input_layernorm: Tensor
    attention: Attention
    post_attention_layernorm: Tensor
    ffn: GatedMLP | MoE
    eps: float

    def attend(self, h: Tensor, batch: Batch, kv: KVCache, cos: Tensor, sin: Tensor) -> Tensor:
        """The first half: h [tokens, hidden] -> the same; extends the layer's rows in `kv`."""
        return h + self.attention.forward(rms_norm(h, self.input_layernorm, self.eps), batch, kv, cos, sin)

    def feed(self, h: Tensor) -> Tensor:
        """The second half, in which tokens do not see each other: h [tokens, hidden] -> the same."""
        return h + self.ffn.forward(rms_norm(h, self.post_attention_layernorm, self.eps))


@dataclass(frozen=True)
class Residence:
    """Where the resident weights live and in what precision; `exact` experts multiply full-precision activations."""

    device: torch.device
    dtype: torch.dtype
    exact: bool
    threads: int
    card: Card | None = None  # `device`, if our own kernels run there
    tier: NvmeTier | None = None  # of the checkpoint's routed experts, where RAM will not hold them all
    pinned: np.ndarray | None = None  # bool [layers, experts]: those that the card is to have and RAM is not
    many: ManyTokens | None = None  # multiplies routed experts on the host where a chunk has many tokens for them
    kv: str = AUTO  # how rows of the KV cache are kept: a member of KINDS, or as they are computed

    def make_kv(self, config: ModelConfig, tokens: int) -> KVCache:
        """An empty cache with room for `tokens` tokens."""
        return KVCache(config, tokens, dtype=self.dtype, device=self.device, kind=self.kv)


def load_block(weights: Weights, residence: Residence, layer: int, stats: RouterStats) -> Block:
    """Read all weights of one layer."""
    config, prefix = weights.checkpoint.config, f"layers.{layer}"
    routed = config.is_moe_layer(layer)
    return Block(
        weights.tensor(f"{prefix}.input_layernorm.weight"),
        Attention(config, layer, weights),
        weights.tensor(f"{prefix}.post_attention_layernorm.weight"),
        _load_moe(weights, residence, layer, stats) if routed else GatedMLP.load(weights, f"{prefix}.mlp"),
        config.rms_norm_eps,
    )


def _load_moe(weights: Weights, residence: Residence, layer: int, stats: RouterStats) -> MoE:
    config, prefix = weights.checkpoint.config, f"layers.{layer}.mlp"
    experts = load_experts(
        weights.checkpoint,
        layer,
        exact=residence.exact,
        dtype=residence.dtype,
        threads=residence.threads,
        tier=residence.tier,
        pinned=None if residence.pinned is None else residence.pinned[layer],
        many=residence.many,
    )
    shared = GatedMLP.load(weights, f"{prefix}.shared_experts") if config.n_shared_experts else None
    return MoE(layer, Router.load(config, weights, f"{prefix}.gate"), experts, shared, stats)


class Transformer:
    """The weights and the arithmetic; knows no text, no requests and no sampling."""

    def __init__(
        self, checkpoint: Checkpoint, residence: Residence, on_layer_loaded: Callable[[int], None] = lambda layer: None
    ) -> None:
        """Reads every weight of `checkpoint`; `on_layer_loaded(n)` is told the number of layers done."""
        config = self.config = checkpoint.config
        self.stats = RouterStats(config)
        self.rope = Rope(config, residence.device)
        self.card = residence.card
        self.cache: ExpertCache | None = None
        weights = Weights(checkpoint, residence.device, residence.dtype, exact=residence.exact, card=self.card)
        # Rows of the table are gathered on the host, but for a head that is the same matrix.
        table = checkpoint.tensor("embed_tokens.weight").to(residence.dtype)
        self.embed_tokens = table.to(residence.device) if config.tie_word_embeddings else table
        self.norm = weights.tensor("norm.weight")
        self.lm_head = Linear(self.embed_tokens) if config.tie_word_embeddings else weights.linear("lm_head")
        self.steps = 0
        self.blocks: list[Block] = []
        for layer in range(config.num_hidden_layers):
            self.blocks.append(load_block(weights, residence, layer, self.stats))
            on_layer_loaded(layer + 1)
        tied = self.embed_tokens.nbytes if config.tie_word_embeddings else 0
        self.resident_bytes = weights.matrix_bytes + tied if residence.device.type == "cpu" else 0

    def keep_hot(self, cache: ExpertCache, stored: Callable[[int], Stored] | None = None) -> None:
        """From now on the card multiplies what `cache` holds: copies of some experts that the host has in RAM, or
        experts of a layer as they are `stored`, where it has not got them all."""
        from hybrid.model.gpu.slots import CardSlots  # needs Triton, as nothing without a card does

        assert self.card is not None
        slots, crossing = CardSlots(self.card, cache), Crossing(self.config, self.card.device, self.norm.dtype, cache)
        for layer, block in enumerate(self.blocks):
            if not isinstance(block.ffn, MoE):
                continue
            on_card = slots.add(layer, block.ffn.experts, None if stored is None else stored(layer))
            if on_card is not None:
                self.blocks[layer] = replace(block, ffn=replace(block.ffn, hot=Hot(cache, on_card, crossing)))
        self.cache, self.stats.cache = cache, cache.counters

    @property
    def host_bytes(self) -> int:
        """Bytes of weights read from the host's memory so far: experts, and on a CPU the resident weights too."""
        return self.stats.expert_bytes + self.steps * self.resident_bytes

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Hidden states [tokens, hidden] after the last block; extends `kv` by the batch's tokens."""
        self.steps += 1
        if self.cache is not None:
            self.cache.step()
        cos, sin = self.rope.table(batch.positions())
        if self.card is not None:
            batch = replace(batch, seen=see(batch, self.config, self.card.device))
        h = self.embed_tokens[batch.token_ids.to(self.embed_tokens.device)].to(cos.device)
        for layer, block in enumerate(self.blocks):
            batch.on_layer(layer)
            h = block.feed(block.attend(h, batch, kv, cos, sin))
        return h

    @torch.inference_mode()
    def head(self, h: Tensor) -> Tensor:
        """Hidden states [rows, hidden] -> logits fp32 [rows, vocab]."""
        return self.lm_head.forward(rms_norm(h, self.norm, self.config.rms_norm_eps)).float()
