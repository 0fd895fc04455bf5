"""The text model a second time, slow and obvious: what the fast code is held against.

No cache, no paging, no batch, no absorption: keys and values are spelled out per head, experts run one token at a time,
rotations are complex products, everything in float64. Weights come from plain safetensors, not through the checkpoint
reader of the runtime. `Mistakes` switches on the errors this family of models invites, so that a test can show it would
notice them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from hybrid.config import ModelConfig

PREFIXES = ("language_model.model.", "language_model.", "model.")


@dataclass(frozen=True)
class Mistakes:
    """Wrong variants on purpose, each one made by some program before; the default is right."""

    nibbles: Literal["offset", "twos_complement", "high_first"] = "offset"
    beta_fast: float | None = None
    half_split_rope: bool = False
    yarn_off_in_short_prompts: bool = False
    softmax_without_mscale: bool = False
    router_in_bf16: bool = False
    bias_in_weights: bool = False
    routed_scaling_forgotten: bool = False
    shared_expert_scaled: bool = False


def plain_name(name: str) -> str:
    """`name` without the prefix under which an export files its text model."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of every shard, as stored, under its plain name."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= {plain_name(name): tensor for name, tensor in load_file(shard).items()}
    return tensors


def unpack_int4(packed: Tensor, nibbles: Literal["offset", "twos_complement", "high_first"] = "offset") -> Tensor:
    """[out, in/8] int32 words -> [out, in] int64 codes -8..7.

    Element k of a row is bits 4(k mod 8)..+3 of word k//8 (least significant nibble first), stored as code + 8.
    """
    order = range(7, -1, -1) if nibbles == "high_first" else range(8)
    stored = torch.stack([(packed.long() >> (4 * i)) & 15 for i in order], dim=-1).flatten(1)
    return torch.where(stored >= 8, stored - 16, stored) if nibbles == "twos_complement" else stored - 8


def dequantize(
    tensors: dict[str, Tensor],
    prefix: str,
    dtype: torch.dtype,
    group_size: int = 32,
    block: tuple[int, int] = (128, 128),
    nibbles: Literal["offset", "twos_complement", "high_first"] = "offset",
) -> Tensor:
    """The matrix [out, in] called `prefix`: int4 exactly if `weight_packed` exists, fp8 if `weight_scale_inv` does.

    int4: W[o, k] = code[o, k] * scale[o, k // group_size], exact. fp8: W = value * scale_inv of its block, rounded to
    bf16, which is the precision those models are released and served in.
    """
    if f"{prefix}.weight_packed" in tensors:
        codes = unpack_int4(tensors[f"{prefix}.weight_packed"], nibbles).to(dtype)
        scales = tensors[f"{prefix}.weight_scale"].to(dtype)
        return codes * scales.repeat_interleave(group_size, dim=1)
    weight = tensors[f"{prefix}.weight"]
    if f"{prefix}.weight_scale_inv" in tensors:
        scales = tensors[f"{prefix}.weight_scale_inv"].float()
        scales = scales.repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
        return (weight.float() * scales[: weight.shape[0], : weight.shape[1]]).bfloat16().to(dtype)
    return weight.to(dtype)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN: 0.1 * mscale * ln(factor) + 1, and 1 when nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(config: ModelConfig, beta_fast: float | None = None, stretched: bool = True) -> Tensor:
    """[rope_dim / 2] float64 angles per position: f_i = theta^(-2i/d), under YaRN blended with f_i / factor.

    The blend is a ramp from pair `low` (kept: turns at least beta_fast times within the original context) to pair
    `high` (stretched: at most beta_slow times), where corr(r) = d ln(L / 2 pi r) / (2 ln theta).
    """
    dim, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if yarn is None or not stretched:
        return frequencies

    def corr(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(corr(yarn.beta_fast if beta_fast is None else beta_fast)), 0)
    high = min(math.ceil(corr(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / yarn.factor * ramp


class Reference:
    """A text model over named tensors; `logits(ids)` is the whole interface.

    `gaps` collects, for every routing decision so far, how far the last chosen expert (or group) was from the first
    one left out, relative to its score: where that is near rounding, two right programs may choose differently.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, Tensor],
        dtype: torch.dtype = torch.float64,
        mistakes: Mistakes | None = None,
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.dtype = dtype
        self.mistakes = mistakes or Mistakes()
        self.gaps: list[float] = []
        self.matrices: dict[str, Tensor] = {}

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[T] ids at positions 0..T-1 -> [T, vocab]: pre-norm blocks h += attention(norm(h)); h += ffn(norm(h))."""
        h = self.tensors["embed_tokens.weight"][torch.as_tensor(token_ids)].to(self.dtype)
        rotations = self.rotations(len(token_ids))
        for layer in range(self.config.num_hidden_layers):
            name = f"layers.{layer}"
            h = h + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", h), rotations)
            h = h + self.feed_forward(layer, self.norm(f"{name}.post_attention_layernorm", h))
        head = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self.norm("norm", h) @ self.matrix(head).T

    def matrix(self, prefix: str) -> Tensor:
        """[out, in], dequantized once and kept."""
        if prefix not in self.matrices:
            block = self.config.weight_block_size or (128, 128)
            self.matrices[prefix] = dequantize(
                self.tensors, prefix, self.dtype, self.config.group_size, block, self.mistakes.nibbles
            )
        return self.matrices[prefix]

    def linear(self, prefix: str, x: Tensor) -> Tensor:
        """x W^T, plus the bias where there is one."""
        bias = self.tensors.get(f"{prefix}.bias")
        return x @ self.matrix(prefix).T + (0 if bias is None else bias.to(self.dtype))

    def norm(self, prefix: str, x: Tensor) -> Tensor:
        """RMSNorm: x / sqrt(mean(x^2) + eps) * weight. One eps everywhere, the config's."""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * self.tensors[f"{prefix}.weight"].to(self.dtype)

    def rotations(self, length: int) -> Tensor:
        """[T, rope_dim / 2] complex: e^(i t f) times mscale(mscale) / mscale(mscale_all_dim)."""
        yarn = self.config.rope_scaling
        short = yarn is not None and length <= yarn.original_max_position_embeddings
        stretched = not (short and self.mistakes.yarn_off_in_short_prompts)
        angles = torch.outer(
            torch.arange(length, dtype=torch.float64),
            inverse_frequencies(self.config, self.mistakes.beta_fast, stretched),
        )
        size = 1.0
        if yarn is not None:
            size = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        return torch.polar(torch.full_like(angles, size), angles)

    def rotate(self, x: Tensor, rotations: Tensor) -> Tensor:
        """[T, heads, rope_dim]: the checkpoint keeps each rotated pair side by side, (x0, x1), (x2, x3), ..."""
        if self.config.rope_interleave and not self.mistakes.half_split_rope:
            pairs = torch.complex(x[..., 0::2].double(), x[..., 1::2].double())
        else:
            first, second = x.double().chunk(2, dim=-1)
            pairs = torch.complex(first, second)
        turned = pairs * rotations[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1).to(self.dtype)

    def softmax_scale(self) -> float:
        """qk_head_dim^(-1/2), times mscale(mscale_all_dim)^2 under YaRN."""
        config, yarn = self.config, self.config.rope_scaling
        scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
        if yarn is None or self.mistakes.softmax_without_mscale:
            return scale
        return scale * yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2

    def attention(self, name: str, x: Tensor, rotations: Tensor) -> Tensor:
        """MLA in the naive form: keys and values of every head are spelled out; the rotary key is shared by all."""
        config, length, heads = self.config, len(x), self.config.num_attention_heads
        if config.q_lora_rank is None:
            q = self.linear(f"{name}.q_proj", x)
        else:
            q = self.linear(f"{name}.q_b_proj", self.norm(f"{name}.q_a_layernorm", self.linear(f"{name}.q_a_proj", x)))
        q_nope, q_pe = q.view(length, heads, -1).split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        row = self.linear(f"{name}.kv_a_proj_with_mqa", x)
        c, k_pe = row.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        kv = self.linear(f"{name}.kv_b_proj", self.norm(f"{name}.kv_a_layernorm", c))
        k_nope, v = kv.view(length, heads, -1).split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)

        k_pe = self.rotate(k_pe[:, None], rotations).expand(-1, heads, -1)
        q = torch.cat([q_nope, self.rotate(q_pe, rotations)], dim=-1)
        k = torch.cat([k_nope, k_pe], dim=-1)
        scores = torch.einsum("thd,shd->hts", q, k) * self.softmax_scale()
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
        return self.linear(f"{name}.o_proj", torch.einsum("hts,shd->thd", weights, v).flatten(1))

    def feed_forward(self, layer: int, x: Tensor) -> Tensor:
        """Dense SwiGLU in the first layers; later the chosen experts, weighted, plus the shared one, unweighted."""
        config, name = self.config, f"layers.{layer}.mlp"
        sparse = config.n_routed_experts and layer >= config.first_k_dense_replace
        if not sparse or layer % config.moe_layer_freq:
            return self.mlp(name, x)
        routed = torch.stack([self.experts(name, token) for token in x])
        if not config.n_shared_experts:
            return routed
        shared = self.mlp(f"{name}.shared_experts", x)
        return routed + (shared * config.routed_scaling_factor if self.mistakes.shared_expert_scaled else shared)

    def experts(self, name: str, token: Tensor) -> Tensor:
        """[hidden] -> [hidden]: sum over the chosen experts of weight * expert(token)."""
        out = torch.zeros_like(token)
        for expert, weight in self.route(name, token):
            out += weight * self.mlp(f"{name}.experts.{expert}", token)
        return out

    def mlp(self, name: str, x: Tensor) -> Tensor:
        """down(silu(gate x) * (up x)), no biases."""
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", gate * torch.sigmoid(gate) * up)

    def route(self, name: str, token: Tensor) -> list[tuple[int, float]]:
        """The top experts of one token with their weights.

        Scores are sigmoids or a softmax of the gate's logits. A correction bias takes part in choosing and never in the
        weights. Weights are divided by their sum if norm_topk_prob, then multiplied by routed_scaling_factor.
        """
        config = self.config
        logits = self.tensors[f"{name}.gate.weight"].to(self.dtype) @ token
        if self.mistakes.router_in_bf16:
            logits = (self.tensors[f"{name}.gate.weight"].bfloat16() @ token.bfloat16()).to(self.dtype)
        scores = torch.sigmoid(logits) if config.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        choice = scores
        if config.topk_method == "noaux_tc":
            choice = scores + self.tensors[f"{name}.gate.e_score_correction_bias"].to(self.dtype)
            if self.mistakes.router_in_bf16:
                choice = choice.bfloat16().to(self.dtype)
        chosen = self.top(self.within_groups(choice), config.num_experts_per_tok)
        weights = (choice if self.mistakes.bias_in_weights else scores)[chosen]
        if config.norm_topk_prob:
            weights = weights / (weights.sum() + 1e-20)
        if not self.mistakes.routed_scaling_forgotten:
            weights = weights * config.routed_scaling_factor
        return list(zip(chosen.tolist(), weights.tolist(), strict=True))

    def within_groups(self, choice: Tensor) -> Tensor:
        """`choice` with the experts outside the best topk_group groups at -inf.

        A group counts as much as its two best experts together (noaux_tc) or its best one (group_limited_greedy).
        """
        config = self.config
        if config.topk_method == "greedy" or config.n_group == 1:
            return choice
        groups = choice.view(config.n_group, -1)
        members = groups.topk(2 if config.topk_method == "noaux_tc" else 1, dim=-1).values
        kept = self.top(members.sum(-1), config.topk_group)
        masked = torch.full_like(groups, -math.inf)
        masked[kept] = groups[kept]
        return masked.flatten()

    def top(self, values: Tensor, k: int) -> Tensor:
        """[k] positions of the k largest values; notes how close the call was."""
        ordered, positions = values.sort(descending=True)
        if k < len(values) and ordered[k] > -math.inf:
            self.gaps.append(float((ordered[k - 1] - ordered[k]) / ordered[k - 1].abs()))
        return positions[:k]
