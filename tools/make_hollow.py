"""A hollow Kimi K2.5: the released layout at its full size, with real headers and holes for data.

`python tools/make_hollow.py DIR` writes 64 sparse shards with 208,550 tensors and 595,148,192,736 tensor bytes, which
take some 30 MB of disk, plus config.json, generation_config.json and the index. `--tokenizer DIR` adds the tokenizer's
files. `--plant KIND:NAME[=VALUE]` (repeatable, stored names) makes one thing wrong:

  missing:NAME   no such tensor      extra:NAME          one tensor more      name:NAME=OTHER   a misspelt tensor
  shape:NAME     shape reversed      dtype:NAME=F16      another dtype        index:NAME=SHARD  a wrong index entry

`--config JSON` overrides keys of the text configuration, for smaller ones.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hybrid.checkpoint.expected import Spec, expected_tensors
from hybrid.checkpoint.header import ITEMSIZE
from hybrid.checkpoint.names import is_vision
from hybrid.checkpoint.write import INDEX, INT4_QUANTIZATION, shard_name, write_header
from hybrid.config import ModelConfig

IDS = {"bos_token_id": 163584, "eos_token_id": 163585, "pad_token_id": 163839}
TEXT_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "dtype": "bfloat16",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 163840,
    "max_position_embeddings": 262144,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 64.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "rms_norm_eps": 1e-05,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "quantization_config": INT4_QUANTIZATION,
    **IDS,
}
VISION_CONFIG: dict[str, Any] = {
    "patch_size": 14,
    "vt_num_hidden_layers": 27,
    "vt_hidden_size": 1152,
    "vt_num_attention_heads": 16,
    "vt_intermediate_size": 4304,
    "init_pos_emb_height": 64,
    "init_pos_emb_width": 64,
    "init_pos_emb_time": 4,
    "pos_emb_type": "divided_fixed",
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "video_attn_type": "spatial_temporal",
    "mm_projector_type": "patchmerger",
    "mm_hidden_size": 1152,
    "text_hidden_size": 7168,
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-05,
}
TOKENIZER_FILES = ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja")


def k25_config(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of Kimi K2.5, with keys of its text configuration overridden."""
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        **IDS,
        "media_placeholder_token_id": 163605,
        "tie_word_embeddings": False,
        "text_config": {**TEXT_CONFIG, **overrides},
        "vision_config": VISION_CONFIG,
    }


def place(name: str, layers: int) -> int:
    """Number of the shard that holds a tensor: one per layer, then tables, projector, image tower."""
    if name.startswith("layers."):
        return int(name.split(".")[1]) + 1
    if not is_vision(name):
        return layers + 1
    return layers + 2 if name.startswith("mm_projector.") else layers + 3


def stored_name(name: str) -> str:
    if is_vision(name):
        return name
    return f"language_model.{name}" if name.startswith("lm_head.") else f"language_model.model.{name}"


Shards = dict[int, dict[str, Spec]]


def plant(shards: Shards, deviation: str, weight_map: dict[str, str]) -> None:
    """Make one thing wrong; see the module's text."""
    kind, _, rest = deviation.partition(":")
    name, _, value = rest.partition("=")
    if kind == "extra":
        shards[1][name] = Spec((8,), frozenset({"BF16"}))
        return
    if kind == "index":
        weight_map[name] = value
        return
    shard = next(specs for specs in shards.values() if name in specs)
    spec = shard[name]
    if kind in ("missing", "name"):
        del shard[name]
    if kind == "name":
        shard[value] = spec
    elif kind == "shape":
        shard[name] = Spec(spec.shape[::-1] if len(spec.shape) > 1 else (*spec.shape, 1), spec.dtypes)
    elif kind == "dtype":
        shard[name] = Spec(spec.shape, frozenset({value}))
    elif kind not in ("missing", "name"):
        raise SystemExit(f"unknown deviation {deviation!r}")


def write_shard(path: Path, specs: Mapping[str, Spec]) -> int:
    """A sparse shard; returns its tensor bytes."""
    entries: dict[str, Any] = {}
    position = 0
    for name, (shape, dtypes) in sorted(specs.items(), key=lambda item: (-ITEMSIZE[min(item[1].dtypes)], item[0])):
        dtype = min(dtypes)
        end = position + math.prod(shape) * ITEMSIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    with path.open("wb") as file:
        file.truncate(write_header(file, entries) + position)
    return position


def make_hollow(directory: Path, config: Mapping[str, Any], deviations: Iterable[str], tokenizer: Path | None) -> None:
    """Write the hollow model to `directory`, which must not exist."""
    raw = k25_config(config)
    facts = ModelConfig.from_dict(raw)
    total = facts.num_hidden_layers + 3
    shards: Shards = {number: {} for number in range(1, total + 1)}
    for name, spec in expected_tensors(facts).items():
        shards[place(name, facts.num_hidden_layers)][stored_name(name)] = spec
    weight_map = {name: shard_name(number, total) for number, specs in shards.items() for name in specs}
    for deviation in deviations:
        plant(shards, deviation, weight_map)
    directory.mkdir(parents=True)
    sizes = [write_shard(directory / shard_name(number, total), specs) for number, specs in shards.items()]
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(raw, indent=2))
    (directory / "generation_config.json").write_text(json.dumps({"max_length": 262144, "eos_token_id": 163586}))
    for name in TOKENIZER_FILES:
        if tokenizer and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, directory / name)
    print(f"{sum(map(len, shards.values())):,} tensors, {sum(sizes):,} bytes in {total} shards: {directory}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--plant", action="append", default=[])
    parser.add_argument("--config", type=json.loads, default={})
    options = parser.parse_args()
    make_hollow(options.directory, options.config, options.plant, options.tokenizer)


if __name__ == "__main__":
    main()
