"""A GGUF file of Kimi K2.5's architecture with random weights, for llama.cpp: `python tools/peers_gguf.py MODEL OUT`.

MODEL is a model directory in the released format; its config.json gives every shape, its weights are not read. The
routed experts take the named type (--type iq2_xxs); the other matrices are q4_K, the head q6_K and the two halves of
kv_b_proj q5_0: in q8_0 or f16 llama.cpp refuses them on processors with AMX. Router, norms and biases are fp32.

The weights are llama.cpp's own quantisation of a few hundred Gaussian rows of each width; every row of every matrix
is one of them, drawn at random, in bytes of its own on disk. That is good for time and for nothing else.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import gguf
import numpy as np
from peers_ggml import Ggml

from hybrid.checkpoint.hf import read_json
from hybrid.config import ModelConfig
from hybrid.errors import KimiError, UsageError

MATRIX, HEAD, HEADS_KV, FLOAT = "q4_K", "q6_K", "q5_0", "f32"
POOL = 256  # quantised rows per type and width
PIECE = 1 << 26  # bytes written at once
SIGMA = 0.02


class Stored(NamedTuple):
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]  # as NumPy has it: columns last
    type: str
    read: float = 1.0  # share of its bytes that computing one token reads

    @property
    def row_bytes(self) -> int:
        """Raises UsageError when a row is not whole blocks of the type."""
        weights, size = gguf.GGML_QUANT_SIZES[number(self.type)]
        if self.shape[-1] % weights:
            raise UsageError(
                f"{self.name} has rows of {self.shape[-1]}; {self.type} comes in blocks of {weights}.",
                "Use a model whose widths are multiples of it.",
            )
        return self.shape[-1] // weights * size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


def number(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def bits_per_weight(name: str) -> float:
    weights, size = gguf.GGML_QUANT_SIZES[number(name)]
    return 8 * size / weights


# --- what the file holds -------------------------------------------------------------------------------------------


def tensors(config: ModelConfig, experts: str) -> Iterator[Stored]:
    """Every tensor llama.cpp wants of this architecture, routed experts in the type `experts`."""
    table = config.vocab_size, config.hidden_size
    yield Stored("token_embd.weight", table, MATRIX, 0.0)  # one row of it
    yield Stored("output_norm.weight", table[1:], FLOAT)
    yield Stored("output.weight", table, HEAD)
    for layer in range(config.num_hidden_layers):
        parts = [*attention(config), *(routed(config, experts) if config.is_moe_layer(layer) else dense(config))]
        yield from (part._replace(name=f"blk.{layer}.{part.name}") for part in parts)


def attention(config: ModelConfig) -> Iterator[Stored]:
    """Of one layer, with the key half of kv_b_proj transposed per head, as queries are absorbed through it."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    rank = config.q_lora_rank
    assert rank is not None
    yield Stored("attn_norm.weight", (hidden,), FLOAT)
    yield Stored("attn_q_a.weight", (rank, hidden), MATRIX)
    yield Stored("attn_q_a_norm.weight", (rank,), FLOAT)
    yield Stored("attn_q_b.weight", (heads * config.qk_head_dim, rank), MATRIX)
    yield Stored("attn_kv_a_mqa.weight", (config.latent_dim, hidden), MATRIX)
    yield Stored("attn_kv_a_norm.weight", (latent,), FLOAT)
    yield Stored("attn_k_b.weight", (heads, latent, config.qk_nope_head_dim), HEADS_KV)
    yield Stored("attn_v_b.weight", (heads, config.v_head_dim, latent), HEADS_KV)
    yield Stored("attn_output.weight", (hidden, heads * config.v_head_dim), MATRIX)
    yield Stored("ffn_norm.weight", (hidden,), FLOAT)


def dense(config: ModelConfig) -> Iterator[Stored]:
    wide, tall = (config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size)
    for name, shape in (("gate", wide), ("up", wide), ("down", tall)):
        yield Stored(f"ffn_{name}.weight", shape, MATRIX)


def routed(config: ModelConfig, experts: str) -> Iterator[Stored]:
    count, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    shared, chosen = config.shared_intermediate_size, config.num_experts_per_tok / count
    yield Stored("ffn_gate_inp.weight", (count, hidden), FLOAT)
    yield Stored("exp_probs_b.bias", (count,), FLOAT)
    for name in ("gate", "up"):
        yield Stored(f"ffn_{name}_exps.weight", (count, width, hidden), experts, chosen)
        yield Stored(f"ffn_{name}_shexp.weight", (shared, hidden), MATRIX)
    yield Stored("ffn_down_exps.weight", (count, hidden, width), experts, chosen)
    yield Stored("ffn_down_shexp.weight", (hidden, shared), MATRIX)


def total_bytes(config: ModelConfig, experts: str) -> int:
    """Of all tensors. Raises UsageError when a type does not go into a width."""
    return sum(tensor.nbytes for tensor in tensors(config, experts))


def bytes_per_token(config: ModelConfig, experts: str) -> int:
    """Weights read to compute one token by itself."""
    return round(sum(tensor.read * tensor.nbytes for tensor in tensors(config, experts)))


def describe(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """The hyperparameters and, for a vocabulary, only its size."""
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)  # all heads share the latent row
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling:
        describe_yarn(writer, config)
    describe_experts(writer, config)


def describe_yarn(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    scaling = config.rope_scaling
    assert scaling is not None
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
    writer.add_rope_scaling_yarn_log_mul(0.1 * scaling.mscale_all_dim)


def describe_experts(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    gating = gguf.ExpertGatingFuncType
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gating.SIGMOID if config.scoring_func == "sigmoid" else gating.SOFTMAX)


# --- writing it ----------------------------------------------------------------------------------------------------


class Pools:
    """Quantised Gaussian rows by type and width, made on first use."""

    def __init__(self, ggml: Ggml, rng: np.random.Generator) -> None:
        self.ggml, self.rng = ggml, rng
        self.known: dict[tuple[str, int], np.ndarray] = {}

    def rows(self, name: str, columns: int) -> np.ndarray:
        """uint8 [POOL, bytes of a row]"""
        if (name, columns) not in self.known:
            values = self.rng.standard_normal((POOL, columns), np.float32) * np.float32(SIGMA)
            self.known[name, columns] = values.view(np.uint8) if name == FLOAT else self._quantised(name, values)
        return self.known[name, columns]

    def _quantised(self, name: str, values: np.ndarray) -> np.ndarray:
        call, kind, columns = self.ggml.call, number(name).value, values.shape[1]
        importance = np.ones(columns, np.float32)
        needed = importance.ctypes.data if call.ggml_quantize_requires_imatrix(kind) else None
        raw = np.zeros((POOL, call.ggml_row_size(kind, columns)), np.uint8)
        call.ggml_quantize_chunk(kind, values.ctypes.data, raw.ctypes.data, 0, POOL, columns, needed)
        return raw


class Drawn(NamedTuple):
    """Rows of a pool in random order; quacks like the array that GGUFWriter writes, without being as large."""

    pool: np.ndarray
    picks: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.picks.size * self.pool.shape[1]

    def tofile(self, file: BinaryIO) -> None:
        for some in np.array_split(self.picks, -(-self.nbytes // PIECE)):
            file.write(self.pool[some].data)


def contents(tensor: Stored, pools: Pools) -> Drawn | np.ndarray:
    """Ones for a norm, zeros for a bias, random rows for a matrix."""
    if len(tensor.shape) == 1:
        return np.full(tensor.shape, float(tensor.name.endswith("norm.weight")), np.float32)
    picks = pools.rng.integers(0, POOL, math.prod(tensor.shape[:-1]))
    return Drawn(pools.rows(tensor.type, tensor.shape[-1]), picks)


def write_gguf(path: Path, config: ModelConfig, experts: str, seed: int = 0) -> int:
    """Write the file, replacing one that is there; returns the bytes of its tensors.

    Raises UsageError for a type llama.cpp does not have, or widths it cannot store in it, before anything is written.
    """
    ggml = Ggml()
    ggml.type_of(experts)
    if config.q_lora_rank is None or config.tie_word_embeddings:
        raise UsageError("Only models with a low-rank query and a head of their own are written.")
    total = total_bytes(config, experts)
    _write(path, config, list(tensors(config, experts)), Pools(ggml, np.random.default_rng(seed)))
    return total


def _write(path: Path, config: ModelConfig, planned: Sequence[Stored], pools: Pools) -> None:
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DEEPSEEK2])
    try:
        describe(writer, config)
        for tensor in planned:
            # float32 here says that the shape counts weights, not bytes.
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, number(tensor.type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(contents(tensor, pools))
    finally:
        writer.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory with the config.json to follow")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="iq2_xxs", help="of the routed experts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        config = ModelConfig.from_dict(read_json(options.model / "config.json"))
        print(f"{write_gguf(options.out, config, options.type, options.seed):,} bytes of tensors: {options.out}")
    except KimiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
