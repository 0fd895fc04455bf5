"""ModelConfig: known numbers of released models, the spellings in use, and refusals by name."""

import math
from typing import Any

import pytest

from hybrid.checkpoint.tiny import tiny_config
from hybrid.checkpoint.write import INT4_QUANTIZATION
from hybrid.config import ModelConfig, RopeScaling, yarn_mscale
from hybrid.errors import CheckpointError

K25_TEXT = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 163840,
    "max_position_embeddings": 262144,
    "rope_scaling": {
        "type": "yarn",
        "factor": 64.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def k25(**overrides: Any) -> dict[str, Any]:
    return tiny_config({**K25_TEXT, **overrides}, experts="int4", nested=True)


def flat(**overrides: Any) -> dict[str, Any]:
    return tiny_config(overrides, experts="bf16", nested=False)


def test_k25_numbers() -> None:
    config = ModelConfig.from_dict(k25())
    assert config.model_type == "kimi_k2" and config.architecture == "KimiK25ForConditionalGeneration"
    assert config.softmax_scale == pytest.approx(0.1446796258, abs=1e-10)
    assert config.qk_head_dim == 192 and config.latent_dim == 576
    assert config.kv_bytes_per_token() == 70272
    assert config.expert_params == 44_040_192 and config.expert_bytes() == 24_772_608
    assert config.num_moe_layers == 60 and config.num_experts == 23040
    assert config.routed_params == 1_014_686_023_680
    assert config.resident_params == 11_722_185_728 - 1_006_592  # the published sum counts norms
    assert 61 * config.attention_params == 6_168_444_928
    assert config.expert_bytes_per_token() == 480 * 24_772_608
    assert [config.is_moe_layer(layer) for layer in (0, 1, 60)] == [False, True, True]


def test_yarn_scale_is_one_factor_squared_and_only_with_mscale_all_dim() -> None:
    plain = 192**-0.5
    for all_dim, factor in ((0, 1.0), (None, 1.0), (0.707, yarn_mscale(64, 0.707) ** 2)):
        rope = {**K25_TEXT["rope_scaling"], "mscale_all_dim": all_dim}  # type: ignore[dict-item]
        assert ModelConfig.from_dict(k25(rope_scaling=rope)).softmax_scale == pytest.approx(plain * factor)
    assert ModelConfig.from_dict(k25(rope_scaling=None)).softmax_scale == plain
    assert yarn_mscale(1.0, 1.0) == 1.0 and yarn_mscale(64, 1) == pytest.approx(0.1 * math.log(64) + 1)


def test_rope_parameters_spelling_means_the_same_as_rope_scaling() -> None:
    old = ModelConfig.from_dict(flat(rope_theta=12345.0))
    raw = flat()
    scaling = raw.pop("rope_scaling")
    del raw["rope_theta"]
    raw["rope_parameters"] = {**scaling, "rope_type": scaling.pop("type"), "rope_theta": 12345.0}
    assert ModelConfig.from_dict(raw) == old
    assert old.rope_theta == 12345.0
    assert old.rope_scaling == RopeScaling(16.0, 256, 32.0, 1.0, 1.0, 1.0)


def test_rope_defaults() -> None:
    raw = flat(rope_scaling={"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8})
    assert ModelConfig.from_dict(raw).rope_scaling == RopeScaling(4.0, 8, 32.0, 1.0, 1.0, 0.0)
    assert ModelConfig.from_dict(flat(rope_scaling={"rope_type": "default"})).rope_scaling is None


@pytest.mark.parametrize(
    ("top", "text", "generation", "ids"),
    [
        (1, 1, None, (1,)),
        ([1, 2], 3, [4, 1], (1, 2, 3, 4)),
        (None, 7, 9, (7, 9)),
        (None, None, None, (1,)),  # the architecture's own default
    ],
)
def test_eos_ids_are_collected_from_everywhere(top: Any, text: Any, generation: Any, ids: tuple[int, ...]) -> None:
    raw = k25()
    del raw["eos_token_id"], raw["text_config"]["eos_token_id"]
    if top is not None:
        raw["eos_token_id"] = top
    if text is not None:
        raw["text_config"]["eos_token_id"] = text
    config = ModelConfig.from_dict(raw, {"eos_token_id": generation} if generation is not None else {})
    assert config.eos_token_ids == ids


def test_deepseek_v2_defaults() -> None:
    raw = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "num_experts_per_tok": 6}
    config = ModelConfig.from_dict({**raw, "q_lora_rank": None, "n_group": None})
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == ("softmax", "greedy", False)
    assert config.q_lora_rank is None and config.n_group == 1 and config.routed_scaling_factor == 1.0
    query, latent = 32 * 192, 576
    assert config.attention_params == 4096 * query + 4096 * latent + 512 * 32 * 256 + 32 * 128 * 4096


def test_deepseek_v3_defaults_and_groups() -> None:
    config = ModelConfig.from_dict({"architectures": ["DeepseekV3ForCausalLM"]})
    assert (config.n_group, config.topk_group, config.n_routed_experts) == (8, 4, 256)
    assert (config.scoring_func, config.topk_method, config.first_k_dense_replace) == ("sigmoid", "noaux_tc", 3)
    assert config.num_moe_layers == 58 and config.eos_token_ids == (1,)


def test_dense_model_and_moe_layer_frequency() -> None:
    dense = ModelConfig.from_dict(flat(n_routed_experts=None))
    assert dense.n_routed_experts == dense.num_experts == dense.num_experts_per_tok == 0
    config = ModelConfig.from_dict(flat(num_hidden_layers=7, first_k_dense_replace=2, moe_layer_freq=2))
    assert config.moe_layers == (2, 4, 6)


def test_quantization_is_found_at_either_level() -> None:
    nested = k25()
    moved = k25()
    moved["quantization_config"] = moved["text_config"].pop("quantization_config")
    assert ModelConfig.from_dict(nested) == ModelConfig.from_dict(moved)
    assert ModelConfig.from_dict(nested).quant_method == "compressed-tensors"
    fp8 = ModelConfig.from_dict(tiny_config({}, experts="fp8", nested=False))
    assert (fp8.quant_method, fp8.weight_block_size) == ("fp8", (128, 128))
    assert ModelConfig.from_dict(flat()).quant_method is None


def scheme(**weights: Any) -> dict[str, Any]:
    group = INT4_QUANTIZATION["config_groups"]["group_0"]
    changed = {**group, "weights": {**group["weights"], **weights}}
    return {**INT4_QUANTIZATION, "config_groups": {"group_0": changed}}


@pytest.mark.parametrize(
    ("quantization", "found"),
    [
        ({"quant_method": "awq", "bits": 4}, "'awq'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt'"),
        ({**INT4_QUANTIZATION, "format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        ({**INT4_QUANTIZATION, "config_groups": {}}, "0 config groups"),
        (scheme(symmetric=False), "symmetric False"),
        (scheme(num_bits=8), "num_bits 8"),
        (scheme(strategy="channel", group_size=None), "strategy 'channel'"),
        (scheme(group_size=16), "group_size 16"),
        (scheme(actorder="group"), "actorder 'group'"),
        ({"quant_method": "fp8"}, "weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, "'e5m2'"),
        ("awq", "must be an object"),
    ],
)
def test_other_quantizations_are_refused_by_name(quantization: Any, found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(k25(quantization_config=quantization))
    assert found in caught.value.message and "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM, llama"),
        ({}, "no architecture"),
        ({"architectures": ["KimiK3ForCausalLM"], "model_type": "kimi_k3"}, "KimiK3ForCausalLM, kimi_k3"),
        ({"architectures": ["KimiK3ForConditionalGeneration"], "model_type": "deepseek_v3"}, "KimiK3"),
        ({"model_type": "kimi_linear"}, "kimi_linear"),
        ({"model_type": "deepseek_v3", "linear_attn_config": {"kda_layers": [1]}}, "linear attention (KDA)"),
        ({"model_type": "deepseek_v3", "index_topk": 2048}, "sparse (indexed) attention"),
        ({"model_type": "deepseek_v32"}, "deepseek_v32"),
        ({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_linear"}}, "kimi_linear"),
        ({"model_type": "kimi_k3", "text_config": {"model_type": "kimi_k2"}}, "kimi_k3"),
        ({"model_type": "kimi_k25"}, "kimi_k25"),
    ],
)
def test_other_architectures_are_refused_by_name(raw: dict[str, Any], found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(raw)
    assert found in caught.value.message and "Supported: Kimi K2.5" in caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ({"hidden_size": "128"}, "hidden_size must be a positive integer, found '128'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope scaling 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**K25_TEXT["rope_scaling"], "attention_factor": 1.2}}, "attention_factor"),  # type: ignore[dict-item]
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"scoring_func": "tanh"}, "scoring_func 'tanh'"),
        ({"topk_method": "random"}, "topk_method 'random'"),
        ({"n_group": 3}, "8 experts in 3 groups"),
        ({"n_group": 2, "topk_group": 4}, "topk_group 4 of 2 groups"),
        ({"num_experts_per_tok": 9}, "9 experts per token of 8"),
        ({"n_group": 4, "topk_group": 1}, "4 experts per token out of 1 groups of 2"),
        ({"qk_rope_head_dim": 15}, "odd qk_rope_head_dim"),
        ({"eos_token_id": ["a"]}, "eos_token_id"),
        ({"moe_intermediate_size": 40}, "groups of 32 along a moe_intermediate_size of 40"),
    ],
)
def test_impossible_values_are_named(overrides: dict[str, Any], found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(tiny_config(overrides, experts="int4", nested=True))
    assert found in caught.value.message
