"""The pocket model's shape: Kimi K2.5 with 20 million parameters, every part of the architecture in place."""

from collections.abc import Mapping
from typing import Any

from hybrid.chat.tokenizer import KIMI_SPECIALS, NUM_SPECIALS
from hybrid.checkpoint.write import INT4_QUANTIZATION
from hybrid.config import ModelConfig

NUM_RANKS = 3840
GROUP = 32  # weights per scale of the routed experts

TEXT_CONFIG: dict[str, Any] = {
    "model_type": "kimi_k2",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": NUM_RANKS + NUM_SPECIALS,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "n_routed_experts": 64,
    "num_experts_per_tok": 8,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 4096,
    # Eight pairs of rotated dimensions: these values keep two of them, blend three and stretch three.
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
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


def released_config(overrides: Mapping[str, Any] | None = None, *, experts: str = "int4") -> dict[str, Any]:
    """config.json nested as K2.5's; `overrides` replace keys of its text_config, `experts` is "int4" or "bf16"."""
    text = {**TEXT_CONFIG, **(overrides or {})}
    ranks = text["vocab_size"] - NUM_SPECIALS
    ids = {name: ranks + offset for offset, (name, _) in KIMI_SPECIALS.items()}
    special = {"bos_token_id": ids["[BOS]"], "eos_token_id": ids["[EOS]"], "pad_token_id": ids["[PAD]"]}
    if experts == "int4":
        text["quantization_config"] = INT4_QUANTIZATION
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        "media_placeholder_token_id": ids["<|media_pad|>"],
        "tie_word_embeddings": False,
        **special,
        "text_config": {**text, **special},
    }


def model_config(overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The facts of the same model."""
    return ModelConfig.from_dict(released_config(overrides))
