"""What a checkpoint must contain, derived from its configuration alone.

The list reproduces the released Kimi K2.5 exactly: 208,550 tensors in 595,148,192,736 bytes.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hybrid.checkpoint.names import expert_prefix
from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError

FLOATS = frozenset({"BF16", "F16", "F32"})
_STORED_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


_BF16, _F32, _FP8 = frozenset({"BF16"}), frozenset({"F32"}), frozenset({"F8_E4M3"})
_I8, _I32, _INTEGERS = frozenset({"I8"}), frozenset({"I32"}), frozenset({"I32", "I64"})
INT8_GROUP = 32  # weights per scale of an int8 matrix


class Spec(NamedTuple):
    """Shape and admissible dtypes (as safetensors spells them) of one tensor."""

    shape: tuple[int, ...]
    dtypes: frozenset[str]


class Linear(NamedTuple):
    """A weight matrix [out_features, in_features], stored plain, as INT4 or int8 groups, or as fp8 blocks."""

    prefix: str
    out_features: int
    in_features: int


def expected_tensors(config: ModelConfig, stored: Mapping[str, str] | None = None) -> dict[str, Spec]:
    """Every tensor of the model by normalised name.

    `stored` (name -> dtype of what is on disk) settles how each linear is kept: it is INT4 if and only if its
    `.weight_packed` exists, and int8, unless it is a routed expert's, if its `.weight_int8` does. Without it, the
    configuration's quantization decides: INT4 for routed experts, fp8 for all linears of the layers.
    """
    stored = stored or {}
    floats = plain_dtypes(config)
    tensors = {name: Spec(shape, floats) for name, shape in _tables(config)}
    if not config.tie_word_embeddings:
        head = Linear("lm_head", config.vocab_size, config.hidden_size)
        tensors |= _quantized(config, head, stored) or _plain(config, head)
    for layer in range(config.num_hidden_layers):
        tensors |= {name: Spec(shape, floats) for name, shape in _layer_vectors(config, layer)}
        if config.is_moe_layer(layer):
            tensors |= _router(config, layer)
        for linear in layer_linears(config, layer):
            tensors |= _linear(config, linear, stored)
    if config.vision_config:
        tensors |= {name: Spec(shape, floats) for name, shape in vision_tensors(config.vision_config, config)}
    return tensors


def plain_dtypes(config: ModelConfig) -> frozenset[str]:
    """Dtypes of unquantized tensors: the configured one, or any float where config.json does not say."""
    known = _STORED_DTYPE.get(str(config.dtype))
    return frozenset({known}) if known else FLOATS


def layer_linears(config: ModelConfig, layer: int) -> Iterator[Linear]:
    """All weight matrices of one layer but the router."""
    hidden, at = config.hidden_size, f"layers.{layer}"
    yield from _attention_linears(config, f"{at}.self_attn")
    if not config.is_moe_layer(layer):
        yield from _mlp(f"{at}.mlp", hidden, config.intermediate_size)
        return
    if config.n_shared_experts:
        yield from _mlp(f"{at}.mlp.shared_experts", hidden, config.shared_intermediate_size)
    for expert in range(config.n_routed_experts):
        yield from _mlp(expert_prefix(layer, expert), hidden, config.moe_intermediate_size)


def _attention_linears(config: ModelConfig, at: str) -> Iterator[Linear]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    if rank is None:
        yield Linear(f"{at}.q_proj", heads * config.qk_head_dim, hidden)
    else:
        yield Linear(f"{at}.q_a_proj", rank, hidden)
        yield Linear(f"{at}.q_b_proj", heads * config.qk_head_dim, rank)
    yield Linear(f"{at}.kv_a_proj_with_mqa", config.latent_dim, hidden)
    yield Linear(f"{at}.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
    yield Linear(f"{at}.o_proj", hidden, heads * config.v_head_dim)


def _mlp(at: str, hidden: int, width: int) -> Iterator[Linear]:
    yield Linear(f"{at}.gate_proj", width, hidden)
    yield Linear(f"{at}.up_proj", width, hidden)
    yield Linear(f"{at}.down_proj", hidden, width)


def _tables(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embed_tokens.weight", (config.vocab_size, config.hidden_size)
    yield "norm.weight", (config.hidden_size,)


def _layer_vectors(config: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Norms and biases of one layer."""
    at, attention = f"layers.{layer}", f"layers.{layer}.self_attn"
    yield f"{at}.input_layernorm.weight", (config.hidden_size,)
    yield f"{at}.post_attention_layernorm.weight", (config.hidden_size,)
    yield f"{attention}.kv_a_layernorm.weight", (config.kv_lora_rank,)
    if config.q_lora_rank is not None:
        yield f"{attention}.q_a_layernorm.weight", (config.q_lora_rank,)
    if config.attention_bias:
        if config.q_lora_rank is not None:
            yield f"{attention}.q_a_proj.bias", (config.q_lora_rank,)
        yield f"{attention}.kv_a_proj_with_mqa.bias", (config.latent_dim,)
        yield f"{attention}.o_proj.bias", (config.hidden_size,)


def _router(config: ModelConfig, layer: int) -> dict[str, Spec]:
    at, experts = f"layers.{layer}.mlp.gate", config.n_routed_experts
    tensors = {f"{at}.weight": Spec((experts, config.hidden_size), plain_dtypes(config))}
    if config.topk_method == "noaux_tc":
        # Kimi's INT4 releases keep the selection bias in float32, which is what choosing experts wants.
        bias = _F32 if config.quant_method == "compressed-tensors" else _F32 | plain_dtypes(config)
        tensors[f"{at}.e_score_correction_bias"] = Spec((experts,), bias)
    return tensors


def _linear(config: ModelConfig, linear: Linear, stored: Mapping[str, str]) -> dict[str, Spec]:
    return _quantized(config, linear, stored) or _fp8(config, linear, stored) or _plain(config, linear)


def _quantized(config: ModelConfig, linear: Linear, stored: Mapping[str, str]) -> dict[str, Spec]:
    """The tensors of a linear kept as codes with a scale per group; none if it is not."""
    prefix, rows, columns = linear
    packed, int8, routed = f"{prefix}.weight_packed", f"{prefix}.weight_int8", ".mlp.experts." in prefix
    by_config = config.quant_method == "compressed-tensors" and routed
    if packed in stored or (by_config and f"{prefix}.weight" not in stored):
        return {
            packed: Spec((rows, -(-columns // 8)), _I32),
            f"{prefix}.weight_scale": Spec((rows, -(-columns // config.group_size)), _BF16),
            f"{prefix}.weight_shape": Spec((2,), _I32 if config.model_type == "kimi_k2" else _INTEGERS),
        }
    if int8 in stored and not routed and columns % INT8_GROUP == 0:
        scales = Spec((rows, columns // INT8_GROUP), _BF16)
        return {int8: Spec((rows, columns), _I8), f"{prefix}.weight_scale": scales}
    return {}


def _fp8(config: ModelConfig, linear: Linear, stored: Mapping[str, str]) -> dict[str, Spec]:
    """The tensors of a linear kept as fp8 blocks; none if it is not."""
    prefix, rows, columns = linear
    plain = f"{prefix}.weight"
    if not config.weight_block_size or stored.get(plain, "F8_E4M3") != "F8_E4M3":
        return {}
    block_rows, block_columns = config.weight_block_size
    blocks = (-(-rows // block_rows), -(-columns // block_columns))
    return {plain: Spec((rows, columns), _FP8), f"{prefix}.weight_scale_inv": Spec(blocks, _F32)}


def _plain(config: ModelConfig, linear: Linear) -> dict[str, Spec]:
    return {f"{linear.prefix}.weight": Spec(linear[1:], plain_dtypes(config))}


def vision_tensors(vision: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The image tower and projector of K2.5; config keys may carry the checkpoint's `vt_` prefix or not."""

    def size(*keys: str) -> int:
        for key in keys:
            if isinstance(vision.get(key), int):
                return int(vision[key])
        raise CheckpointError(f"config.json: vision_config lacks {keys[0]}.", "Restore the original config.json.")

    hidden = size("vt_hidden_size", "hidden_size", "mm_hidden_size")
    width = size("vt_intermediate_size", "intermediate_size")
    patch = size("patch_size")
    rows, columns = size("init_pos_emb_height", "pos_emb_height"), size("init_pos_emb_width", "pos_emb_width")
    yield "vision_tower.patch_embed.proj.weight", (hidden, 3, patch, patch)
    yield "vision_tower.patch_embed.proj.bias", (hidden,)
    yield "vision_tower.patch_embed.pos_emb.weight", (rows, columns, hidden)
    for block in range(size("vt_num_hidden_layers", "num_hidden_layers")):
        yield from _vision_block(f"vision_tower.encoder.blocks.{block}", hidden, width)
    yield from _affine("vision_tower.encoder.final_layernorm", (hidden,))
    merge = vision.get("merge_kernel_size") or (2, 2)
    merged = hidden * int(merge[0]) * int(merge[1])
    yield from _affine("mm_projector.pre_norm", (hidden,))
    yield from _affine("mm_projector.proj.0", (merged, merged))
    yield from _affine("mm_projector.proj.2", (config.hidden_size, merged))


def _vision_block(at: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _affine(f"{at}.norm0", (hidden,))
    yield from _affine(f"{at}.norm1", (hidden,))
    yield from _affine(f"{at}.wqkv", (3 * hidden, hidden))
    yield from _affine(f"{at}.wo", (hidden, hidden))
    yield from _affine(f"{at}.mlp.fc0", (width, hidden))
    yield from _affine(f"{at}.mlp.fc1", (hidden, width))


def _affine(at: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}.weight", shape
    yield f"{at}.bias", shape[:1]
