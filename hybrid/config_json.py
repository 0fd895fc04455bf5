"""Reading config.json: the spellings in use, what an absent key means, and what is refused.

`read_fields` turns the parsed JSON into the keyword arguments of `ModelConfig`; every refusal is a CheckpointError that
names the key or the architecture it found.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrid.errors import CheckpointError

SUPPORTED = (
    "Kimi K2.5 (KimiK25ForConditionalGeneration), Kimi K2 (kimi_k2), DeepseekV3ForCausalLM and DeepseekV2ForCausalLM"
)

# model_type of the text tower -> what an absent key means (the defaults of the architecture's own configuration class).
_COMMON: dict[str, Any] = {
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "num_nextn_predict_layers": 0,
}
_V3: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_V2: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": None,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES = {"kimi_k2": _V3, "deepseek_v3": _V3, "deepseek_v2": _V2}
_FAMILY_OF_ARCHITECTURE = {
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "KimiK2ForCausalLM": "kimi_k2",
}
# Keys that only architectures with another kind of attention carry.
_FOREIGN_KEYS = {"linear_attn_config": "linear attention (KDA)", "index_topk": "sparse (indexed) attention"}


@dataclass(frozen=True)
class RopeScaling:
    """YaRN parameters. Context grows by `factor` over `original_max_position_embeddings` tokens."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


def read_fields(raw: Mapping[str, Any], generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ModelConfig from a parsed config.json (flat, or nested under `text_config`)."""
    text = _text_config(raw)
    family = _family(raw, text)
    facts = _Facts({**_FAMILIES[family], **text})
    experts = facts.count("n_routed_experts")
    fields: dict[str, Any] = {key: facts.positive(key) for key in _POSITIVE}
    fields |= {key: facts.positive(key, absent=1) for key in ("moe_layer_freq", "n_group", "topk_group")}
    fields |= {key: facts.count(key) for key in _COUNTS}
    fields |= {key: facts.number(key) for key in ("routed_scaling_factor", "rms_norm_eps")}
    fields |= {key: facts.flag(key) for key in _FLAGS}
    fields |= {key: str(facts.raw[key]) for key in ("scoring_func", "topk_method", "hidden_act")}
    fields |= {key: facts.optional(key) for key in ("bos_token_id", "pad_token_id")}
    fields |= _quantization(raw.get("quantization_config") or text.get("quantization_config"))
    fields |= {
        "model_type": family,
        "architecture": [*_architectures(raw, text), family][0],
        "num_experts_per_tok": facts.positive("num_experts_per_tok") if experts else 0,
        "q_lora_rank": facts.optional("q_lora_rank") or None,
        "rope_theta": _rope_theta(facts),
        "rope_scaling": _rope_scaling(facts),
        "eos_token_ids": _eos_token_ids(raw, text, generation_config) or (facts.positive("eos_token_id"),),
        "dtype": text.get("dtype") or text.get("torch_dtype") or raw.get("dtype") or raw.get("torch_dtype"),
        "vision_config": dict(raw["vision_config"]) if raw.get("vision_config") else None,
    }
    _refuse_contradictions(fields)
    return fields


_POSITIVE = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_COUNTS = (
    "first_k_dense_replace", "moe_intermediate_size", "n_routed_experts", "n_shared_experts",
    "num_nextn_predict_layers",
)  # fmt: skip
_FLAGS = ("norm_topk_prob", "attention_bias", "tie_word_embeddings", "rope_interleave")


class _Facts:
    """Typed reads of config.json values; a value of the wrong kind is reported with its key."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def _integer(self, key: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "a positive integer" if least else "an integer >= 0"
            raise CheckpointError(f"config.json: {key} must be {kind}, found {value!r}.", _REPAIR)
        return value

    def positive(self, key: str, absent: Any = None) -> int:
        value = self.raw.get(key)
        return self._integer(key, absent if value is None else value, 1)

    def count(self, key: str) -> int:
        return self._integer(key, self.raw.get(key) or 0, 0)

    def optional(self, key: str) -> int | None:
        value = self.raw.get(key)
        return None if value is None else self._integer(key, value, 0)

    def flag(self, key: str) -> bool:
        return bool(self.raw.get(key))

    def number(self, key: str) -> float:
        return _number(key, self.raw.get(key))


_REPAIR = "Restore the original config.json."


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"config.json: {key} must be a number, found {value!r}.", _REPAIR)
    return float(value)


def _text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        return dict(raw)
    outer = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw}
    return {**outer, **text}


def _architectures(raw: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in [*(raw.get("architectures") or ()), *(text.get("architectures") or ())]]


def _family(raw: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """The text tower's model type, or CheckpointError naming the architecture found."""
    types = [str(t) for t in (raw.get("model_type"), text.get("model_type")) if t]
    architectures = _architectures(raw, text)
    found = ", ".join(dict.fromkeys([*architectures, *types])) or "no architecture"
    for key, what in _FOREIGN_KEYS.items():
        if text.get(key) or raw.get(key):
            raise CheckpointError(f"This model uses {what}: config.json says {found}.", f"Supported: {SUPPORTED}.")
    outer = types[0] if types else ""
    nested = isinstance(raw.get("text_config"), Mapping)
    known_outer = outer == "kimi_k25" if nested else outer in _FAMILIES or not outer
    family = str(text.get("model_type") or ("deepseek_v3" if nested else ""))
    if not family and architectures:
        family = _FAMILY_OF_ARCHITECTURE.get(architectures[0], "")
    if known_outer and family in _FAMILIES and not any("KimiK3" in name for name in architectures):
        return family
    raise CheckpointError(f"This architecture is not supported: config.json says {found}.", f"Supported: {SUPPORTED}.")


def _rope_parameters(facts: _Facts) -> dict[str, Any]:
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(facts.raw.get(key), Mapping):
            return dict(facts.raw[key])
    return {}


def _rope_theta(facts: _Facts) -> float:
    parameters = facts.raw.get("rope_parameters")
    inner = parameters.get("rope_theta") if isinstance(parameters, Mapping) else None
    return _number("rope_theta", facts.raw["rope_theta"] if inner is None else inner)


def _rope_scaling(facts: _Facts) -> RopeScaling | None:
    spec = _rope_parameters(facts)
    kind = spec.get("rope_type") or spec.get("type") or "default"
    if kind in ("default", "none"):
        return None
    if kind != "yarn":
        raise CheckpointError(f"config.json: rope scaling {kind!r} is not supported.", "Supported: yarn or none.")
    if spec.get("attention_factor") is not None or spec.get("truncate") is False:
        raise CheckpointError("config.json: yarn with attention_factor or truncate=false is not supported.", _REPAIR)
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    return RopeScaling(
        factor=_number("rope_scaling.factor", spec.get("factor")),
        original_max_position_embeddings=_Facts(spec).positive("original_max_position_embeddings"),
        **{
            key: default if spec.get(key) is None else _number(f"rope_scaling.{key}", spec[key])
            for key, default in defaults.items()
        },
    )


def _eos_token_ids(raw: Mapping[str, Any], text: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Every end-of-sequence id anyone names, once each; each source may give one integer or a list."""
    ids: list[int] = []
    for source in (raw, text, generation):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise CheckpointError(f"eos_token_id must be an integer or a list of them, found {ids!r}.", _REPAIR)
    return tuple(dict.fromkeys(ids))  # in the order named


def _quantization(spec: Any) -> dict[str, Any]:
    """ModelConfig fields from a quantization_config; anything but symmetric INT4 groups or block fp8 is refused."""
    if not spec:
        return {}
    if not isinstance(spec, Mapping):
        raise CheckpointError(f"config.json: quantization_config must be an object, found {spec!r}.", _REPAIR)
    method = spec.get("quant_method")
    if method == "fp8":
        return {"quant_method": "fp8", "weight_block_size": _fp8_block(spec)}
    if method == "compressed-tensors":
        return {"quant_method": "compressed-tensors", "group_size": _int4_group(spec)}
    raise _unsupported_quantization(f"quant_method {method!r}")


def _unsupported_quantization(what: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: quantization by {what} is not supported.",
        "Supported: compressed-tensors pack-quantized symmetric INT4 in groups of 32 or a multiple, fp8 blocks, bf16.",
    )


def _fp8_block(spec: Mapping[str, Any]) -> tuple[int, int]:
    block = spec.get("weight_block_size")
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
        raise _unsupported_quantization(f"fp8 with weight_block_size {block!r}")
    if spec.get("fmt", "e4m3") != "e4m3":
        raise _unsupported_quantization(f"fp8 of kind {spec['fmt']!r}")
    return (block[0], block[1])


def _int4_group(spec: Mapping[str, Any]) -> int:
    """Group size of the one weight scheme in a compressed-tensors config."""
    if spec.get("format") != "pack-quantized":
        raise _unsupported_quantization(f"compressed-tensors format {spec.get('format')!r}")
    groups = list((spec.get("config_groups") or {}).values())
    if len(groups) != 1 or not isinstance(groups[0], Mapping):
        raise _unsupported_quantization(f"compressed-tensors with {len(groups)} config groups")
    weights = groups[0].get("weights") or {}
    wanted = {"type": "int", "num_bits": 4, "strategy": "group", "symmetric": True}
    for key, value in wanted.items():
        if weights.get(key) != value:
            raise _unsupported_quantization(f"compressed-tensors weights with {key} {weights.get(key)!r}")
    size = weights.get("group_size")
    order = weights.get("actorder")
    if order or not isinstance(size, int) or size <= 0 or size % 32:
        raise _unsupported_quantization(f"compressed-tensors with group_size {size!r}, actorder {order!r}")
    return size


def _refuse_contradictions(fields: dict[str, Any]) -> None:
    """Raise CheckpointError for values that cannot work together or that no code path implements."""
    refuse_if: dict[str, bool] = {
        f"hidden_act {fields['hidden_act']!r}": fields["hidden_act"] != "silu",
        f"an odd qk_rope_head_dim of {fields['qk_rope_head_dim']}": fields["qk_rope_head_dim"] % 2 == 1,
    }
    if fields["n_routed_experts"]:
        groups, experts, topk = fields["n_group"], fields["n_routed_experts"], fields["num_experts_per_tok"]
        methods = ("noaux_tc", "greedy", "group_limited_greedy")
        refuse_if |= {
            f"scoring_func {fields['scoring_func']!r}": fields["scoring_func"] not in ("sigmoid", "softmax"),
            f"topk_method {fields['topk_method']!r}": fields["topk_method"] not in methods,
            f"{experts} experts in {groups} groups": experts % groups > 0,
            f"topk_group {fields['topk_group']} of {groups} groups": fields["topk_group"] > groups,
            f"{topk} experts per token of {experts}": topk > experts,
            f"{topk} experts per token out of {fields['topk_group']} groups of {experts // groups}": (
                topk > fields["topk_group"] * (experts // groups)
            ),
            "experts of width 0": fields["moe_intermediate_size"] == 0,
        }
    if fields.get("quant_method") == "compressed-tensors":
        for key in ("hidden_size", "moe_intermediate_size"):
            what = f"INT4 groups of {fields['group_size']} along a {key} of {fields[key]}"
            refuse_if[what] = fields[key] % fields["group_size"] > 0
    for what, found in refuse_if.items():
        if found:
            raise CheckpointError(f"config.json asks for {what}, which is not supported.", _REPAIR)
