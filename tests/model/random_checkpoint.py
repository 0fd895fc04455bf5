"""Random checkpoints of the DeepSeek/Kimi family, written to disk as their makers publish them.

Nothing here goes through the project's checkpoint code: `random_config` makes a config.json in each maker's spelling,
`random_tensors` the tensors as they ship (int4 experts, fp8 blocks or bf16), `write` the directory.
"""

import base64
import copy
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hybrid.config import ModelConfig
from tests.reference import PREFIXES

SEEDS = range(32)  # the checkpoints every comparison runs over; one test checks what they cover
NUM_SPECIALS = 256
INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "type": "int", "num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True,
                "dynamic": False, "actorder": None, "observer": "minmax",
            },
            "input_activations": None,
            "output_activations": None,
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
}  # fmt: skip
ARCHITECTURES = {
    "kimi_k25": "KimiK25ForConditionalGeneration",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
}


@dataclass(frozen=True)
class Case:
    """A checkpoint on disk with what the comparisons need; `tensors` are as stored, under plain names."""

    path: Path
    raw: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, Tensor]


def random_config(rng: random.Random) -> dict[str, Any]:
    """A config.json in the spelling of Kimi K2.5, Kimi K2, DeepSeek V3 or V2 (sigmoid or softmax routing)."""
    family = rng.choice(["kimi_k25", "kimi_k25", "kimi_k2", "deepseek_v3", "deepseek_v2"])
    experts = rng.choice([8, 12, 16, 24, 32, 48, 64, 128, 384])
    text = random_shapes(rng, experts) | random_router(rng, family, experts) | random_rope(rng)
    text["architectures"] = [ARCHITECTURES["kimi_k2" if family == "kimi_k25" else family]]
    text["model_type"] = "kimi_k2" if family == "kimi_k25" else family
    if family == "deepseek_v2":
        text["num_attention_heads"] = rng.choice([2, 4, 8])  # transformers insists that they divide hidden_size
    text["num_key_value_heads"] = text["num_attention_heads"]
    if family == "deepseek_v3":
        text["rope_interleave"] = rng.random() < 0.75
    quantization: dict[str, list[dict[str, Any] | None]] = {
        "kimi_k25": [INT4],
        "kimi_k2": [INT4, fp8_config(rng)],
        "deepseek_v3": [None, fp8_config(rng)],
        "deepseek_v2": [None],
    }
    if chosen := rng.choice(quantization[family]):
        text["quantization_config"] = copy.deepcopy(chosen)
    text["attention_bias"] = rng.random() < 0.2
    if family != "kimi_k25":
        return text
    ids = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")}
    top = {"architectures": [ARCHITECTURES[family]], "model_type": family, "dtype": "bfloat16", "vision_config": None}
    return top | ids | {"text_config": text}


def fp8_config(rng: random.Random) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": rng.choice([[32, 32], [128, 128]]),
    }


def random_shapes(rng: random.Random, experts: int) -> dict[str, Any]:
    """Sizes that divide nothing in particular except what the format itself asks for (groups of 32)."""
    large = experts > 64
    layers = rng.randint(2, 3 if large else 5)
    vocab = 2 * NUM_SPECIALS + rng.randint(0, 88)
    return {
        "hidden_size": 32 * rng.randint(3, 4 if large else 8),
        "num_hidden_layers": layers,
        "first_k_dense_replace": rng.randint(0, 1 if layers == 2 and rng.random() < 0.9 else 2),
        "moe_layer_freq": 1,
        "intermediate_size": 32 * rng.randint(2, 8),
        "moe_intermediate_size": 32 if large else 32 * rng.randint(1, 4),
        "num_attention_heads": rng.randint(2, 8),
        "q_lora_rank": rng.choice([None, 32, 48, 72, 96]),
        "kv_lora_rank": rng.choice([32, 40, 64, 96, 128]),
        "qk_nope_head_dim": rng.choice([8, 16, 24, 32, 64]),
        "qk_rope_head_dim": rng.choice([8, 16, 18, 32, 64]),
        "v_head_dim": rng.choice([8, 16, 24, 40, 64]),
        "vocab_size": vocab,
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-4]),
        "tie_word_embeddings": rng.random() < 0.25,
        "hidden_act": "silu",
        "num_nextn_predict_layers": 0,
        "bos_token_id": vocab - NUM_SPECIALS,
        "eos_token_id": vocab - NUM_SPECIALS + 1,
        "pad_token_id": vocab - 1,
    }


def random_router(rng: random.Random, family: str, experts: int) -> dict[str, Any]:
    """Routing by sigmoid with a correction bias (V3, Kimi) or by softmax, greedy or limited to groups (V2)."""
    groups = rng.choice([n for n in (1, 1, 2, 4, 8) if experts % n == 0 and experts // n >= 2])
    kept = rng.randint(1, groups)
    topk = rng.randint(1, min(8, kept * experts // groups))
    softmax = family == "deepseek_v2"
    method = ("greedy" if groups == 1 else "group_limited_greedy") if softmax else "noaux_tc"
    return {
        "n_routed_experts": experts,
        "num_experts_per_tok": topk,
        "n_shared_experts": rng.randint(0, 2),
        "routed_scaling_factor": rng.choice([1.0, 2.5, 2.827]),
        "scoring_func": "softmax" if softmax else "sigmoid",
        "topk_method": method,
        "n_group": groups,
        "topk_group": kept,
        # One expert alone always weighs 1 once normalized; and transformers' V2 never normalizes.
        "norm_topk_prob": not softmax and topk > 1 and rng.random() < 0.75,
    }


def random_rope(rng: random.Random) -> dict[str, Any]:
    """Plain rope or YaRN, in the old spelling (rope_scaling, rope_theta) or the new one (rope_parameters)."""
    theta = rng.choice([10000.0, 50000.0])
    if rng.random() < 0.3:
        old: dict[str, Any] = {"rope_scaling": None, "rope_theta": theta, "max_position_embeddings": 512}
        new: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    else:
        original, factor = rng.choice([32, 64]), rng.choice([8.0, 16.0, 40.0, 64.0])
        yarn: dict[str, Any] = {
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": rng.choice([1.0, 8.0, 32.0]),
            "beta_slow": rng.choice([0.5, 1.0]),
        }
        # DeepSeek's meaning of an absent pair is mscale 1, mscale_all_dim 0.
        mscale, all_dim = rng.choice([(1.0, 1.0), (1.0, 1.0), (None, None), (0.707, 0.707), (0.707, 1.0), (0.707, 0.0)])
        if mscale is not None:
            yarn |= {"mscale": mscale, "mscale_all_dim": all_dim}
        kind = rng.choice(["type", "rope_type"])
        old = {
            "rope_scaling": yarn | {kind: "yarn"},
            "rope_theta": theta,
            "max_position_embeddings": int(original * factor),
        }
        new = yarn | {"rope_type": "yarn", "rope_theta": theta}
    if rng.random() < 0.6:
        return old
    return {"rope_parameters": new, "max_position_embeddings": old["max_position_embeddings"]}


def text_of(raw: dict[str, Any]) -> dict[str, Any]:
    return raw.get("text_config", raw)


def linear_shapes(text: dict[str, Any]) -> Iterator[tuple[str, int, int, float]]:
    """(plain name, out, in, gain) of every linear that may be quantized.

    The gain on the queries spreads attention scores by about 2, so that an error in rope or in the softmax scale shows.
    """
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    qk = text["qk_nope_head_dim"] + text["qk_rope_head_dim"]
    latent, values = text["kv_lora_rank"], text["v_head_dim"]
    for layer in range(text["num_hidden_layers"]):
        attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        if rank := text["q_lora_rank"]:
            yield f"{attention}.q_a_proj", rank, hidden, 1.0
            yield f"{attention}.q_b_proj", heads * qk, rank, 2.0
        else:
            yield f"{attention}.q_proj", heads * qk, hidden, 2.0
        yield f"{attention}.kv_a_proj_with_mqa", latent + text["qk_rope_head_dim"], hidden, 1.0
        yield f"{attention}.kv_b_proj", heads * (text["qk_nope_head_dim"] + values), latent, 1.0
        yield f"{attention}.o_proj", hidden, heads * values, 1.0
        widths = {mlp: text["intermediate_size"]}
        if layer >= text["first_k_dense_replace"]:
            widths = {f"{mlp}.experts.{i}": text["moe_intermediate_size"] for i in range(text["n_routed_experts"])}
            if text["n_shared_experts"]:
                widths[f"{mlp}.shared_experts"] = text["moe_intermediate_size"] * text["n_shared_experts"]
        for name, width in widths.items():
            yield f"{name}.gate_proj", width, hidden, 1.0
            yield f"{name}.up_proj", width, hidden, 1.0
            yield f"{name}.down_proj", hidden, width, 1.5


def random_tensors(raw: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Plain name -> tensor as stored. Scaled so that attention, routing and next tokens all vary."""
    text, rng = text_of(raw), torch.Generator().manual_seed(seed)
    quantization = text.get("quantization_config") or {}
    hidden, vocab = text["hidden_size"], text["vocab_size"]

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=rng) * std

    tensors: dict[str, Tensor] = {}
    for name, out, width, gain in linear_shapes(text):
        if quantization.get("quant_method") == "compressed-tensors" and ".experts." in name:
            tensors |= stored_int4(name, out, width, gain, rng)
        elif quantization.get("quant_method") == "fp8":
            block = quantization["weight_block_size"]
            tensors |= stored_fp8(name, normal(out, width, std=gain / math.sqrt(width)), block)
        else:
            tensors[f"{name}.weight"] = normal(out, width, std=gain / math.sqrt(width)).bfloat16()

    norms = {"norm": hidden}
    for layer in range(text["num_hidden_layers"]):
        name = f"layers.{layer}"
        norms |= {f"{name}.input_layernorm": hidden, f"{name}.post_attention_layernorm": hidden}
        norms[f"{name}.self_attn.kv_a_layernorm"] = text["kv_lora_rank"]
        biases = {"kv_a_proj_with_mqa": text["kv_lora_rank"] + text["qk_rope_head_dim"], "o_proj": hidden}
        if text["q_lora_rank"]:
            norms[f"{name}.self_attn.q_a_layernorm"] = biases["q_a_proj"] = text["q_lora_rank"]
        if text["attention_bias"]:
            vectors = {f"{name}.self_attn.{linear}.bias": normal(width, std=0.2) for linear, width in biases.items()}
            tensors |= {bias: values.bfloat16() for bias, values in vectors.items()}
        if layer >= text["first_k_dense_replace"]:
            gate = f"{name}.mlp.gate"
            tensors[f"{gate}.weight"] = normal(text["n_routed_experts"], hidden, std=1.5 / math.sqrt(hidden)).bfloat16()
            if text["topk_method"] == "noaux_tc":
                tensors[f"{gate}.e_score_correction_bias"] = normal(text["n_routed_experts"], std=0.2)
    tensors |= {f"{name}.weight": (1 + normal(width, std=0.2)).bfloat16() for name, width in norms.items()}
    head_std = 3 / math.sqrt(hidden)
    tied = text["tie_word_embeddings"]
    tensors["embed_tokens.weight"] = normal(vocab, hidden, std=head_std if tied else 1.0).bfloat16()
    if not tied:
        tensors["lm_head.weight"] = normal(vocab, hidden, std=head_std).bfloat16()
    return tensors


def pack_int4(codes: Tensor) -> Tensor:
    """[out, in] codes -8..7 -> [out, in/8] int32: code + 8 in the k-th nibble from the least significant end."""
    stored = (codes + 8).long().view(codes.shape[0], -1, 8)
    words = (stored << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def stored_int4(name: str, out: int, width: int, gain: float, rng: torch.Generator) -> dict[str, Tensor]:
    """All sixteen codes, bf16 scales that differ by group; weights of standard deviation about gain / sqrt(in)."""
    codes = torch.randint(-8, 8, (out, width), generator=rng)
    spread = torch.rand((out, width // 32), generator=rng) + 0.5
    return {
        f"{name}.weight_packed": pack_int4(codes),
        f"{name}.weight_scale": (spread * gain / (4.6 * math.sqrt(width))).bfloat16(),
        f"{name}.weight_shape": torch.tensor([out, width], dtype=torch.int32),
    }


def stored_fp8(name: str, weight: Tensor, block: Sequence[int]) -> dict[str, Tensor]:
    """e4m3 values with one float32 scale per block; the blocks at the edges are cut short."""
    out, width = weight.shape
    rows, columns = math.ceil(out / block[0]), math.ceil(width / block[1])
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[:out, :width] = weight
    tiles = padded.view(rows, block[0], columns, block[1])
    scales = tiles.abs().amax(dim=(1, 3)) / 448
    values = (tiles / scales[:, None, :, None]).view_as(padded)[:out, :width]
    return {f"{name}.weight": values.to(torch.float8_e4m3fn).contiguous(), f"{name}.weight_scale_inv": scales}


def write(directory: Path, raw: dict[str, Any], tensors: dict[str, Tensor], prefix: str, shards: int = 3) -> None:
    """A directory as published: config.json, sharded safetensors with an index, and a vocabulary of bytes and pairs."""
    directory.mkdir(parents=True, exist_ok=True)
    head = "language_model.lm_head." if prefix.startswith("language_model.") else "lm_head."
    named = {name.replace("lm_head.", head) if name.startswith("lm_head.") else prefix + name: tensor
             for name, tensor in tensors.items()}  # fmt: skip
    names = list(named)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        file = f"model-{i + 1:05d}-of-{shards:06d}.safetensors"
        save_file({name: named[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in named.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(raw))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": text_of(raw)["eos_token_id"]}))
    write_vocabulary(directory, text_of(raw)["vocab_size"])


def write_vocabulary(directory: Path, vocab_size: int) -> None:
    """`tiktoken.model` of 256 bytes plus byte pairs, and the specials that fill the end of the vocabulary."""
    ranks = [bytes([i]) for i in range(256)]
    ranks += [bytes([97 + i % 26, 97 + i // 26]) for i in range(vocab_size - NUM_SPECIALS - 256)]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    (directory / "tiktoken.model").write_text("\n".join(lines) + "\n")
    first = len(ranks)
    names = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 10: "<|im_system|>",
             17: "<|im_middle|>", 22: "<think>", 23: "</think>", 254: "[UNK]", 255: "[PAD]"}  # fmt: skip
    specials = {str(first + i): {"content": name, "special": True} for i, name in names.items()}
    settings = {"added_tokens_decoder": specials, "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def make_case(directory: Path, seed: int) -> Case:
    """The checkpoint of this seed, written under `directory`."""
    rng = random.Random(seed)
    raw = random_config(rng)
    kimi = "text_config" in raw
    tensors = random_tensors(raw, seed)
    write(directory, raw, tensors, prefix=rng.choice(PREFIXES[:2]) if kimi else "model.")
    return Case(directory, raw, ModelConfig.from_dict(copy.deepcopy(raw)), tensors)
