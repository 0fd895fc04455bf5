"""Multi-head latent attention in absorbed form: every head reads the one compressed row kept per token.

With W = kv_b_proj as [heads, nope + v, rank], the naive scores q_nope . (W_k c) equal (W_k^T q_nope) . c, and the
values sum_p p W_v c equal W_v (sum_p p c). So the cache holds only c (after its norm) and the rotated shared key.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.config import ModelConfig
from hybrid.memory.kv_cache import KVCache
from hybrid.model.batch import Batch, Seen, Segment
from hybrid.model.layers import TILE, HeadLinear, Linear, Weights, beside, rms_norm
from hybrid.model.rope import rotate
from quant import bf16

FEW = 4  # tokens of a sequence whose sums our own kernels make, one by one
SCORES_AT_ONCE = 16 << 20  # scores of one tile, 64 MiB of fp32


@dataclass(frozen=True)
class QueryLatent:
    """From a query's normed latent to the query: K2.5 and DeepSeek V3 have one, others come from the hidden state."""

    q_a_layernorm: Tensor
    q_b_proj: Linear
    eps: float

    @classmethod
    def load(cls, weights: Weights, prefix: str, eps: float) -> "QueryLatent":
        norm = weights.tensor(f"{prefix}.q_a_layernorm.weight")
        return cls(norm, weights.linear(f"{prefix}.q_b_proj"), eps)

    def forward(self, latent: Tensor) -> Tensor:
        """[tokens, q_lora_rank] -> [tokens, heads * qk_head_dim]."""
        return self.q_b_proj.forward(rms_norm(latent, self.q_a_layernorm, self.eps))


class Attention:
    """One layer's attention; extends its layer of the KV cache, and sees all rows as that keeps them, new ones too."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        prefix = f"layers.{layer}.self_attn"
        self.config = config
        self.layer = layer
        self.query = None if config.q_lora_rank is None else QueryLatent.load(weights, prefix, config.rms_norm_eps)
        names = ("q_proj" if self.query is None else "q_a_proj", "kv_a_proj_with_mqa")
        self.q_kv_a_proj = beside([weights.linear(f"{prefix}.{name}") for name in names])
        self.kv_a_layernorm = weights.tensor(f"{prefix}.kv_a_layernorm.weight")
        self.o_proj = weights.linear(f"{prefix}.o_proj")
        heads, nope, v = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
        absorbed = weights.matrix(f"{prefix}.kv_b_proj").view(heads, nope + v, config.kv_lora_rank)
        self.w_k = HeadLinear(absorbed[:, :nope].transpose(1, 2))  # [heads, rank, nope]
        self.w_v = HeadLinear(absorbed[:, nope:])  # [heads, v, rank]
        self.card = weights.card

    def forward(self, x: Tensor, batch: Batch, kv: KVCache, cos: Tensor, sin: Tensor) -> Tensor:
        """x [tokens, hidden] (normed) -> [tokens, hidden]; cos, sin [tokens, rope / 2]."""
        query, latent = self.q_kv_a_proj.forward(x).tensor_split([-self.config.latent_dim], dim=-1)
        rows = self._latent_rows(latent, cos, sin)
        for s in batch.segments:
            kv.write(self.layer, s.page_table, s.past, rows[s.start : s.stop])
        if batch.seen is not None:
            context = self._on_card(self._queries(query, cos, sin), batch.seen, kv)
            return self.o_proj.forward(self._values(context))
        out = [part for start in range(0, len(x), TILE) for part in self._stretch(query, cos, sin, batch, start, kv)]
        return self.o_proj.forward(torch.cat(out) if len(out) > 1 else out[0])

    def _queries(self, query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[tokens, heads, latent_dim]: each head's query, absorbed, beside its rotated part."""
        config = self.config
        q = query if self.query is None else self.query.forward(query)
        q = q.view(len(q), config.num_attention_heads, config.qk_head_dim)
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return torch.cat((self.w_k.forward(q_nope), rotate(q_pe, cos, sin, config.rope_interleave)), dim=-1)

    def _latent_rows(self, latent: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[tokens, latent_dim], as cached: the normed latent beside the rotated key, which gets no norm."""
        config = self.config
        c, k_pe = latent.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        c = rms_norm(c, self.kv_a_layernorm, config.rms_norm_eps)
        return torch.cat((c, rotate(k_pe, cos, sin, config.rope_interleave)), dim=-1)

    def _stretch(self, query: Tensor, cos: Tensor, sin: Tensor, batch: Batch, start: int, kv: KVCache) -> list[Tensor]:
        """[rows, heads * v_head_dim] for TILE rows of a batch from `start` on, one tensor per sequence among them."""
        stop = min(start + TILE, len(query))
        queries = self._queries(query[start:stop], cos[start:stop], sin[start:stop])
        among = [
            (s, max(s.start, start), min(s.stop, stop)) for s in batch.segments if s.start < stop and start < s.stop
        ]
        return [self._attend(queries[a - start : b - start], s, s.past + b - s.start, kv) for s, a, b in among]

    def _attend(self, queries: Tensor, segment: Segment, seen: int, kv: KVCache) -> Tensor:
        """[tokens, heads * v_head_dim] for the last of a sequence's first `seen` tokens; softmax and sums in fp32."""
        keys = kv.read(self.layer, segment.page_table, seen)
        context = self._few(queries, keys) if self._is_few(queries, keys) else self._many(queries, keys.float())
        return self._values(context)

    def _values(self, context: Tensor) -> Tensor:
        """Latents [tokens, heads, rank] -> [tokens, heads * v_head_dim]."""
        width = self.config.num_attention_heads * self.config.v_head_dim
        return self.w_v.forward(context).reshape(len(context), width)

    def _on_card(self, queries: Tensor, seen: Seen, kv: KVCache) -> Tensor:
        """Latents [tokens, heads, rank] summed by weight, for all sequences of a decode step at once."""
        from hybrid.model.gpu.attention import decode  # needs Triton, as nothing without a card does

        assert self.card is not None
        return decode(self.card.launch, queries, kv.rows[self.layer], seen, kv.format, self.config.softmax_scale)

    def _is_few(self, queries: Tensor, keys: Tensor) -> bool:
        """Whether this is a decode step that our own kernels take; torch would first widen every key to fp32."""
        fits = keys.device.type == "cpu" and keys.dtype == torch.bfloat16 and keys.is_contiguous()
        fewest = len(keys) - len(queries) + 1  # rows the first of the tokens sees
        widths = (queries.shape[2], self.config.kv_lora_rank)
        return fits and len(queries) <= FEW and all(bf16.supports(fewest, width) for width in widths)

    def _few(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Latents [tokens, heads, rank] summed by weight, for the last tokens of keys bf16 [.., latent_dim]."""
        bits = keys.view(torch.int16).numpy()
        context = []
        for token, query in enumerate(queries.float()):
            visible = bits[: len(bits) - len(queries) + token + 1]
            scores = torch.from_numpy(bf16.multiply(visible, query.contiguous().numpy()))
            weights = (scores * self.config.softmax_scale).softmax(dim=-1)
            context.append(torch.from_numpy(bf16.combine(weights.numpy(), visible, self.config.kv_lora_rank)))
        return torch.stack(context).to(queries.dtype)

    def _many(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The same for any number of tokens, keys fp32: in tiles, so that the scores stay small."""
        tokens, heads, _ = queries.shape
        past = len(keys) - tokens
        context = []
        for part in queries.split(max(1, SCORES_AT_ONCE // (heads * len(keys)))):
            context.append(self._tile(part, keys[: past + len(part)], past))
            past += len(part)
        return torch.cat(context)

    def _tile(self, queries: Tensor, keys: Tensor, past: int) -> Tensor:
        """Latents [tokens, heads, rank] summed by weight, queries at positions past..; keys fp32 [.., latent_dim]."""
        tokens, heads, width = queries.shape
        scores = torch.mm(queries.reshape(tokens * heads, width).float(), keys.T).mul_(self.config.softmax_scale)
        scores = scores.view(tokens, heads, len(keys))
        if tokens > 1:
            future = torch.ones(tokens, len(keys), dtype=torch.bool, device=keys.device).triu_(past + 1)
            scores.masked_fill_(future.unsqueeze(1), -torch.inf)
        weights = scores.softmax(dim=-1).view(tokens * heads, len(keys))
        return torch.mm(weights, keys[:, : self.config.kv_lora_rank]).view(tokens, heads, -1).to(queries.dtype)
