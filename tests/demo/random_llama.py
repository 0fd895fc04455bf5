"""A random Llama model small enough to convert in a second, in memory and as a GGUF file."""

from dataclasses import replace
from pathlib import Path

import gguf
import torch
from torch import Tensor

from hybrid.demo import experts as moe
from hybrid.demo.llama import LlamaConfig, LlamaLayer
from hybrid.demo.vocabulary import END, END_OF_TEXT, START, UNUSED, printable_bytes

CONFIG = LlamaConfig(
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    intermediate_size=moe.SHARED + 32 * moe.SLOTS,
    max_position_embeddings=512,
    rope_theta=1000.0,
    rms_norm_eps=1e-5,
)
CONTROL = [END_OF_TEXT, START, END, UNUSED]


class RandomLlama:
    """A `Llama` with weights that keep activations near 1; a few hidden channels stand out, as in real models."""

    def __init__(self, seed: int = 0, **overrides: int | float) -> None:
        self.config = replace(CONFIG, **overrides)  # type: ignore[arg-type]
        self.tokens = CONTROL + sorted(printable_bytes())[: 256 - 16] + ["Ġt", "he"]
        random = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=random) / columns**0.5

        def norm() -> Tensor:
            return 1 + 0.3 * torch.randn(hidden, generator=random)

        hidden, ffn = self.config.hidden_size, self.config.intermediate_size
        keys = self.config.num_key_value_heads * self.config.head_dim
        self._embedding = matrix(len(self.tokens), hidden) * hidden**0.5
        self._embedding[:, :3] *= 8
        self._norm = norm()
        self.layers = [
            LlamaLayer(
                norm(), 2 * matrix(hidden, hidden), 2 * matrix(keys, hidden), matrix(keys, hidden),
                matrix(hidden, hidden), norm(), matrix(ffn, hidden), matrix(ffn, hidden), matrix(hidden, ffn),
            )
            for _ in range(self.config.num_hidden_layers)
        ]  # fmt: skip

    def embedding(self) -> Tensor:
        return self._embedding

    def final_norm(self) -> Tensor:
        return self._norm

    def layer(self, i: int) -> LlamaLayer:
        return self.layers[i]


def write_gguf(model: RandomLlama, path: Path) -> Path:
    """The model as a GGUF file with the metadata that the real one has."""
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_token_list(model.tokens)
    writer.add_tensor("token_embd.weight", model.embedding().numpy())
    writer.add_tensor("output_norm.weight", model.final_norm().numpy())
    names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    for i, layer in enumerate(model.layers):
        for name, tensor in zip(names, layer, strict=True):
            writer.add_tensor(f"blk.{i}.{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
