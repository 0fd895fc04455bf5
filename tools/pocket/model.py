"""The trainable text model: K2.5's forward pass over plain tensors, written for many short documents at once.

It is a function of its weights, a dict by checkpoint name with the routed experts of a layer stacked. Those given to
`Forward` are the ones multiplied: rounded to bf16, the experts perhaps to INT4 (pocket.qat). The gradient by them is
applied to the fp32 masters, which is all there is to the straight-through estimator.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.config import ModelConfig
from hybrid.model.layers import rms_norm
from hybrid.model.rope import Rope, rotate
from pocket.attention import DocumentAttention, Layout
from pocket.experts import Dispatch, RoutedExperts
from pocket.loss import HeadLoss
from pocket.start import SPREAD, look_for_same, single_threaded

Weights = Mapping[str, Tensor]
GATE, BIAS = "mlp.gate.weight", "mlp.gate.e_score_correction_bias"
GATE_UP, DOWN = "mlp.experts.gate_up_proj.weight", "mlp.experts.down_proj.weight"


@dataclass(frozen=True)
class Tokens:
    """Documents one after the other, no padding, and where loss is taken."""

    ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    layout: Layout
    before: Tensor  # int64 [losses]: the token that predicts
    targets: Tensor  # int64 [losses]: what it should predict
    weights: Tensor  # fp32 [losses]

    @classmethod
    def of(cls, ids: Tensor, positions: Tensor, documents: Tensor, weights: Tensor, heads: int) -> "Tokens":
        """From arrays [rows, length]; documents numbers the document of each token of a row, -1 for padding."""
        real = documents >= 0
        rows = torch.arange(len(ids))[:, None].expand_as(documents)[real]
        numbers = documents[real]
        new = torch.ones(len(rows), dtype=torch.bool)
        new[1:] = (rows[1:] != rows[:-1]) | (numbers[1:] != numbers[:-1])
        ends = torch.cat((new.nonzero().flatten(), torch.tensor([len(rows)])))
        weight = weights[real]
        at = (weight > 0).nonzero().flatten()
        assert not new[at].any(), "the first token of a document has nothing to be predicted from"
        layout = Layout.of(ends.diff().tolist(), heads)
        flat = ids[real]
        return cls(flat, positions[real], layout, at - 1, flat[at], weight[at])


@dataclass(frozen=True)
class Pass:
    """What a forward pass leaves besides hidden states; `largest` is [layers, heads], `loads` [moe layers, experts]."""

    largest: Tensor  # fp32: the largest attention logit of each head, scaled as for the softmax
    loads: Tensor  # int64: tokens that chose each expert


class Forward:
    """The model of these weights; `bias` is the router's correction by layer, fp32 [experts]."""

    def __init__(self, config: ModelConfig, weights: Weights, bias: Mapping[int, Tensor]) -> None:
        self.config, self.weights, self.bias = config, weights, bias
        self.rope = Rope(config, torch.device("cpu"))

    def hidden(self, tokens: Tokens) -> tuple[Tensor, Pass]:
        """[tokens, hidden] after the final norm."""
        cos, sin = self.rope.table(tokens.positions)
        h = F.embedding(tokens.ids, self.weights["embed_tokens.weight"])
        largest, loads = [], []
        for layer in range(self.config.num_hidden_layers):
            out, top = self._attention(layer, self._norm(f"layers.{layer}.input_layernorm", h), tokens.layout, cos, sin)
            h = h + out
            out, load = self._feed(layer, self._norm(f"layers.{layer}.post_attention_layernorm", h))
            h = h + out
            largest.append(top)
            loads += load
        return self._norm("norm", h), Pass(torch.stack(largest), torch.stack(loads))

    def loss(self, tokens: Tokens) -> tuple[Tensor, Tensor, Pass]:
        """The weighted sum of -log p over all positions with a loss, how many were best guesses, and the rest."""
        h, rest = self.hidden(tokens)
        head = self.weights["lm_head.weight"]
        loss, first = HeadLoss.apply(h.index_select(0, tokens.before), head, tokens.targets, tokens.weights)
        return loss, first, rest

    def logits(self, ids: Tensor) -> Tensor:
        """ids int64 [tokens], one document -> fp32 [tokens, vocab]."""
        none = torch.empty(0, dtype=torch.int64)
        layout = Layout.of([len(ids)], self.config.num_attention_heads)
        tokens = Tokens(ids, torch.arange(len(ids)), layout, none, none, torch.empty(0))
        return F.linear(self.hidden(tokens)[0], self.weights["lm_head.weight"]).float()

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def _attention(self, layer: int, x: Tensor, layout: Layout, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """MLA with keys and values spelled out; x [tokens, hidden] -> the same, and the largest logit by head."""
        config, at = self.config, f"layers.{layer}.self_attn"
        q = self._linear(f"{at}.q_b_proj", self._norm(f"{at}.q_a_layernorm", self._linear(f"{at}.q_a_proj", x)))
        q_nope, q_pe = _heads(q, config).split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        row = self._linear(f"{at}.kv_a_proj_with_mqa", x)
        c, k_pe = row.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        kv = self._linear(f"{at}.kv_b_proj", self._norm(f"{at}.kv_a_layernorm", c))
        k_nope, v = _heads(kv, config).split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        k_pe = rotate(k_pe[:, None], cos, sin, config.rope_interleave).expand(-1, config.num_attention_heads, -1)
        q = torch.cat((q_nope, rotate(q_pe, cos, sin, config.rope_interleave)), dim=-1) * config.softmax_scale
        out, largest = DocumentAttention.apply(q, torch.cat((k_nope, k_pe), dim=-1), v, layout)
        return self._linear(f"{at}.o_proj", out.flatten(1)), largest

    def _feed(self, layer: int, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The dense MLP, or the chosen experts and the shared one with the load of each expert."""
        at = f"layers.{layer}"
        if not self.config.is_moe_layer(layer):
            return self._mlp(f"{at}.mlp", x), []
        topk_ids, topk_weights = self._route(layer, x)
        dispatch = Dispatch.of(topk_ids, self.config.n_routed_experts)
        experts = self.weights[f"{at}.{GATE_UP}"], self.weights[f"{at}.{DOWN}"]
        routed = RoutedExperts.apply(x, topk_weights, *experts, dispatch)
        load = topk_ids.flatten().bincount(minlength=self.config.n_routed_experts)
        return routed + self._mlp(f"{at}.mlp.shared_experts", x), [load]

    def _mlp(self, at: str, x: Tensor) -> Tensor:
        hidden = F.silu(self._linear(f"{at}.gate_proj", x)) * self._linear(f"{at}.up_proj", x)
        return self._linear(f"{at}.down_proj", hidden)

    def _route(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """topk_ids int64 and topk_weights fp32 [tokens, top_k]; the bias takes part in the choice alone."""
        config = self.config
        scores = F.linear(x.float(), self.weights[f"layers.{layer}.{GATE}"]).sigmoid()
        choice = scores.detach() + self.bias[layer]
        topk_ids = choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(1, topk_ids)
        return topk_ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor


def _heads(x: Tensor, config: ModelConfig) -> Tensor:
    return x.unflatten(1, (config.num_attention_heads, -1))


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every trained tensor by name; experts are stacked, [experts, 2, width, hidden] and [experts, hidden, width]."""
    c, hidden, heads = config, config.hidden_size, config.num_attention_heads
    assert c.q_lora_rank and c.scoring_func == "sigmoid" and c.n_group == 1 and c.norm_topk_prob
    found = {"embed_tokens.weight": (c.vocab_size, hidden)}
    for layer in range(c.num_hidden_layers):
        attention: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_a_proj": (c.q_lora_rank, hidden),
            "self_attn.q_a_layernorm": (c.q_lora_rank,),
            "self_attn.q_b_proj": (heads * c.qk_head_dim, c.q_lora_rank),
            "self_attn.kv_a_proj_with_mqa": (c.latent_dim, hidden),
            "self_attn.kv_a_layernorm": (c.kv_lora_rank,),
            "self_attn.kv_b_proj": (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
            "self_attn.o_proj": (hidden, heads * c.v_head_dim),
            "post_attention_layernorm": (hidden,),
        }
        feed = _moe_shapes(c) if c.is_moe_layer(layer) else _mlp_shapes("mlp", hidden, c.intermediate_size)
        found |= {f"layers.{layer}.{name}.weight": shape for name, shape in {**attention, **feed}.items()}
    return {**found, "norm.weight": (hidden,), "lm_head.weight": (c.vocab_size, hidden)}


def _mlp_shapes(at: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{at}.gate_proj": (width, hidden), f"{at}.up_proj": (width, hidden), f"{at}.down_proj": (hidden, width)}


def _moe_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, width, experts = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
    return {
        "mlp.gate": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2, width, hidden),
        "mlp.experts.down_proj": (experts, hidden, width),
        **_mlp_shapes("mlp.shared_experts", hidden, c.shared_intermediate_size),
    }


def initial(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """fp32 masters to start from: matrices keep the size of what passes through, those that write to the residual
    stream less the deeper the model is. Attention does not begin from chance alone (pocket.start)."""
    generator = torch.Generator().manual_seed(seed)
    writes = 1 / math.sqrt(2 * config.num_hidden_layers)
    masters = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            masters[name] = torch.ones(shape)
            continue
        gain = writes if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        spread = SPREAD if name == "embed_tokens.weight" else gain / math.sqrt(shape[-1])
        masters[name] = spread * torch.randn(shape, generator=generator)
    with single_threaded():
        look_for_same(masters, config, generator)
    return masters


def initial_bias(config: ModelConfig) -> dict[int, Tensor]:
    """The router's correction by layer, fp32 [experts], before any balancing."""
    return {layer: torch.zeros(config.n_routed_experts) for layer in config.moe_layers}


def rounded(masters: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as a checkpoint keeps them, bf16, in the type to compute with; the router's in fp32, as it scores."""
    found = {}
    for name, master in masters.items():
        wide = torch.float32 if name.endswith(GATE) else dtype
        found[name] = master.detach().bfloat16().to(wide)
    return found
