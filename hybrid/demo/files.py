"""The text files of the demo checkpoint: configuration, generation defaults, chat template, attribution."""

import json
from pathlib import Path
from typing import Any

from hybrid.chat.tokenizer import KIMI_SPECIALS, NUM_SPECIALS
from hybrid.checkpoint.write import INT4_QUANTIZATION
from hybrid.demo import experts as moe
from hybrid.demo.llama import LlamaConfig
from hybrid.demo.mla import QK_NOPE_HEAD_DIM

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # what it was trained with


def text_files(config: LlamaConfig, num_ranks: int, experts: str) -> dict[str, str]:
    """File name -> content; the tokenizer's files are not among them."""
    ids = {name: num_ranks + offset for offset, (name, _) in KIMI_SPECIALS.items()}
    text = {**text_config(config, num_ranks + NUM_SPECIALS), **_special_ids(ids)}
    if experts == "int4":
        text["quantization_config"] = INT4_QUANTIZATION
    outer = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        **_special_ids(ids),
        "text_config": text,
    }
    generation = {
        "max_length": config.max_position_embeddings,
        "eos_token_id": ids["<|im_end|>"],
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
        "thinking": False,
        "default_system": SYSTEM,
    }
    return {
        "config.json": json.dumps(outer, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "chat_template.jinja": _read("chat_template.jinja").replace("DEFAULT_SYSTEM", SYSTEM),
        "NOTICE": _read("NOTICE.txt"),
    }


def text_config(config: LlamaConfig, vocab_size: int) -> dict[str, Any]:
    """config.json's text_config, in the keys of Kimi K2.5's."""
    heads, width = config.num_attention_heads, (config.intermediate_size - moe.SHARED) // moe.SLOTS
    return {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": width,
        "n_routed_experts": 2 * moe.SLOTS,
        "num_experts_per_tok": moe.SLOTS,
        "n_shared_experts": moe.SHARED // width,
        "routed_scaling_factor": float(moe.SLOTS),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": config.hidden_size,
        "kv_lora_rank": config.hidden_size,
        "qk_nope_head_dim": QK_NOPE_HEAD_DIM,
        "qk_rope_head_dim": config.num_key_value_heads * config.head_dim,
        "v_head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "num_nextn_predict_layers": 0,
    }


def _special_ids(ids: dict[str, int]) -> dict[str, int]:
    return {"bos_token_id": ids["[BOS]"], "eos_token_id": ids["[EOS]"], "pad_token_id": ids["[PAD]"]}


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
