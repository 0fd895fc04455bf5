"""A random model of a few hundred kilobytes in the released checkpoint format, made in a fraction of a second.

Tests and first steps use it wherever the real thing would be too large: every tensor, file and spelling is there, only
the sizes are small. Weights are scaled so that activations stay near 1, the router has clear favourites and greedy
decoding wanders instead of repeating one token.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid.chat.template import DEFAULT_TEMPLATE
from hybrid.chat.tokenizer import NUM_SPECIALS, write_tokenizer
from hybrid.checkpoint.expected import Spec, expected_tensors
from hybrid.checkpoint.write import DTYPES, INT4_QUANTIZATION, CheckpointWriter
from hybrid.config import ModelConfig

NUM_RANKS = 320
IM_END = 2  # offset of <|im_end|> behind the last rank

TINY_TEXT_CONFIG: dict[str, Any] = {
    "model_type": "kimi_k2",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "vocab_size": NUM_RANKS + NUM_SPECIALS,
    "max_position_embeddings": 4096,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "num_nextn_predict_layers": 0,
}

FP8_QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_QUANTIZATIONS = {"int4": INT4_QUANTIZATION, "fp8": FP8_QUANTIZATION, "bf16": None}


def make_tiny(
    directory: Path | str,
    *,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    experts: str = "int4",
    prefix: str = "language_model.model.",
) -> Path:
    """Write a random checkpoint to `directory` and return it.

    `config` overrides keys of the text configuration (`vision_config` adds an image tower). `experts` is "int4", "bf16"
    or "fp8" (which, as released fp8 models do, covers every linear of the text model). A `prefix` starting with
    "language_model." nests the configuration as K2.5 does; "model." or "" gives a flat DeepSeek-style config.json.
    """
    raw = tiny_config(config or {}, experts=experts, nested=prefix.startswith("language_model."))
    facts = ModelConfig.from_dict(raw)
    head_prefix = "language_model." if prefix.startswith("language_model.") else ""
    rng = np.random.default_rng(seed)
    with CheckpointWriter(directory, prefix=prefix, head_prefix=head_prefix) as writer:
        for name, spec in expected_tensors(facts).items():
            _add_random(writer, name, spec, facts, rng)
        write_tokenizer(writer.staging, tiny_ranks(facts.vocab_size - NUM_SPECIALS))
        return writer.finish(_text_files(raw, facts))


def tiny_config(overrides: Mapping[str, Any], *, experts: str, nested: bool) -> dict[str, Any]:
    """config.json of a tiny model: the released layout if `nested`, else the flat one of DeepSeek models.

    All of it is the caller's to change.
    """
    text = deepcopy({**TINY_TEXT_CONFIG, **overrides})
    vision = text.pop("vision_config", None)
    if text["model_type"] == "deepseek_v2":
        text["architectures"] = ["DeepseekV2ForCausalLM"]
    ranks = text["vocab_size"] - NUM_SPECIALS
    ids = {"bos_token_id": ranks, "eos_token_id": ranks + 1, "pad_token_id": ranks + 255}
    text = {**text, **ids, **{key: overrides[key] for key in ids if key in overrides}}
    quantization = deepcopy(_QUANTIZATIONS[experts])
    if quantization is not None and "quantization_config" not in overrides:
        text["quantization_config"] = quantization
    if not nested:
        return text
    outer = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "dtype": text["dtype"]}
    media = {"media_placeholder_token_id": ranks + 21, "tie_word_embeddings": text["tie_word_embeddings"]}
    return {**outer, **ids, **media, "text_config": text, **({"vision_config": vision} if vision else {})}


def tiny_ranks(count: int) -> list[bytes]:
    """`count` tokens: the 256 single bytes, then words and pairs of letters; the same list every time."""
    words = "the of and to in is you that it he was for on are as with his they I at be this have from or one had by"
    letters = "etaoinshrdlu"
    pairs = [a + b for a in letters for b in letters]
    # Byte pair encoding reaches a token only by merging two others, so a word needs its halves in the list too.
    merged = [f" {word}"[:end] for word in words.split() for end in range(2, len(word) + 2)]
    numbered = (f"{a}{b}{c}" for c in letters for a in letters for b in letters)
    tokens = dict.fromkeys([bytes([byte]) for byte in range(256)])
    tokens |= dict.fromkeys(text.encode() for text in [*merged, *pairs])
    tokens |= dict.fromkeys(text.encode() for text in numbered)
    assert 256 <= count <= len(tokens), f"a tiny vocabulary has 256 to {len(tokens)} ordinary tokens, not {count}"
    return list(tokens)[:count]


def _text_files(raw: dict[str, Any], facts: ModelConfig) -> dict[str, str]:
    im_end = facts.vocab_size - NUM_SPECIALS + IM_END
    generation = {"max_length": facts.max_position_embeddings, "eos_token_id": im_end}
    return {
        "config.json": json.dumps(raw, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "chat_template.jinja": DEFAULT_TEMPLATE,
    }


def _add_random(writer: CheckpointWriter, name: str, spec: Spec, facts: ModelConfig, rng: np.random.Generator) -> None:
    if name.endswith((".weight_scale", ".weight_shape", ".weight_scale_inv")):
        return  # written together with the weight they belong to
    if name.endswith(".weight_packed"):
        rows, columns = spec.shape[0], spec.shape[1] * 8
        linear = name.removesuffix(".weight_packed")
        writer.add_int4(linear, *quantize_int4(_random(linear, (rows, columns), rng), facts.group_size))
    elif "F8_E4M3" in spec.dtypes and facts.weight_block_size:
        weight, scales = quantize_fp8(torch.from_numpy(_random(name, spec.shape, rng)), facts.weight_block_size)
        writer.add(name, weight)
        writer.add(name + "_scale_inv", scales)
    else:
        dtype = DTYPES[max(spec.dtypes)]  # float32 where there is a choice
        writer.add(name, torch.from_numpy(_random(name, spec.shape, rng)).to(dtype))


def _random(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """float32 values whose spread depends on the tensor's part in the model."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name and name.endswith(".weight") or name == "norm.weight":
        return 1 + 0.1 * noise
    if name.endswith(("bias", "pos_emb.weight")):
        return 0.1 * noise
    if name == "embed_tokens.weight":
        return noise
    gain = 4.0 if name == "lm_head.weight" else 2.0 if name.endswith(("o_proj.weight", "gate.weight")) else 1.0
    return noise * np.float32(gain / np.sqrt(np.prod(shape[1:])))


def quantize_int4(weight: np.ndarray, group_size: int = 32) -> tuple[np.ndarray, torch.Tensor]:
    """float32 [out, in] -> (int8 codes [out, in], bfloat16 scales [out, in // group_size]) by largest value / 7."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group_size, group_size)
    scales = torch.from_numpy(np.abs(groups).max(axis=2) / 7).to(torch.bfloat16)
    codes = np.rint(groups / np.maximum(scales.float().numpy(), 1e-12)[:, :, None]).clip(-8, 7)
    return codes.astype(np.int8).reshape(rows, columns), scales


def quantize_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [out, in] -> (float8_e4m3 [out, in], float32 scale per block of rows x columns): weight = fp8 * scale."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    tiles = padded.reshape(-(-rows // block[0]), block[0], -(-columns // block[1]), block[1])
    scales = tiles.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448.0  # 448: largest e4m3 value
    quantized = (tiles / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return quantized.to(torch.float8_e4m3fn), scales
