"""The facts of a model, read once from its config.json and never changed.

Field names are the checkpoint's own (a grep from the model card lands here). Everything the runtime does is driven by
these numbers; what it cannot do is refused by name before a byte of weights is touched.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrid.config_json import RopeScaling, read_fields

__all__ = ["ModelConfig", "RopeScaling", "yarn_mscale"]


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature 0.1 * mscale * ln(factor) + 1 (1 when the context is not extended)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Frozen facts of one model, named as in the checkpoint's text configuration. Sizes are elements, not bytes."""

    model_type: str
    architecture: str
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    moe_layer_freq: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int  # 0: every layer is dense
    num_experts_per_tok: int
    n_shared_experts: int
    routed_scaling_factor: float
    scoring_func: str  # sigmoid | softmax
    topk_method: str  # noaux_tc | greedy | group_limited_greedy
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    num_attention_heads: int
    q_lora_rank: int | None  # None: one full-rank q_proj
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    attention_bias: bool
    tie_word_embeddings: bool
    hidden_act: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str | None = None  # of the unquantized tensors, e.g. bfloat16; None: config.json does not say
    quant_method: str | None = None  # None | compressed-tensors | fp8
    group_size: int = 32  # weights per INT4 scale
    weight_block_size: tuple[int, int] | None = None  # rows, columns per fp8 scale
    vision_config: dict[str, Any] | None = None
    rope_interleave: bool = True
    num_nextn_predict_layers: int = 0  # extra prediction layers on disk after the last one; never run

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> "ModelConfig":
        """Read a parsed config.json; both nested (`text_config`) and flat layouts are accepted.

        `generation_config` may add end-of-sequence ids. Raises CheckpointError naming whatever is not supported.
        """
        return cls(**read_fields(raw, generation_config or {}))

    # -- derived shapes ---------------------------------------------------------------------------------------------
    @property
    def qk_head_dim(self) -> int:
        """Width of one query/key head: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values kept per token and layer in the latent KV cache: compressed latent and shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Attention score factor: qk_head_dim^-0.5, times the square of YaRN's temperature where it applies."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is None or not self.rope_scaling.mscale_all_dim:
            return scale
        return scale * yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` routes to experts (true) or is a plain MLP."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer))

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def num_experts(self) -> int:
        """Routed experts in the whole model (layers x experts)."""
        return self.num_moe_layers * self.n_routed_experts

    @property
    def shared_intermediate_size(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size

    # -- counts for planning ----------------------------------------------------------------------------------------
    @property
    def expert_params(self) -> int:
        """Weights of one routed expert (gate, up, down)."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def routed_params(self) -> int:
        return self.num_experts * self.expert_params

    @property
    def attention_params(self) -> int:
        """Weights of one layer's attention projections (norms and biases not counted)."""
        heads = self.num_attention_heads
        query = heads * self.qk_head_dim
        rank = self.q_lora_rank
        q = self.hidden_size * query if rank is None else rank * (self.hidden_size + query)
        kv = self.hidden_size * self.latent_dim
        kv += self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return q + kv + heads * self.v_head_dim * self.hidden_size

    @property
    def resident_params(self) -> int:
        """Weights every token needs: all of the text model but routed experts, norms and router biases."""
        dense = (self.num_hidden_layers - self.num_moe_layers) * 3 * self.hidden_size * self.intermediate_size
        shared = 3 * self.hidden_size * self.shared_intermediate_size
        router = self.hidden_size * self.n_routed_experts
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * self.attention_params + dense + self.num_moe_layers * (shared + router) + tables

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of latent KV cache one token takes over all layers."""
        return self.num_hidden_layers * self.latent_dim * itemsize

    def expert_bytes(self, bits_per_weight: float = 4.5) -> int:
        """Bytes of one routed expert; 4.5 bits is INT4 with one bf16 scale per 32 weights."""
        return round(self.expert_params * bits_per_weight / 8)

    def expert_bytes_per_token(self, bits_per_weight: float = 4.5) -> int:
        """Bytes of routed experts read to produce one token."""
        return self.num_moe_layers * self.num_experts_per_tok * self.expert_bytes(bits_per_weight)
