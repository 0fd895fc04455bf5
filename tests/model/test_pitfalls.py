"""Mistakes that programs running this family of models have made, one test each.

Most compare three answers: the runtime's, the reference's, and the reference's with the mistake switched on. The first
two must agree, and the third must differ clearly, or the test could not have noticed.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid import Kimi, SamplingParams
from hybrid.chat.message import Message
from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError, KimiError
from tests.model.oracle import settled_tokens
from tests.model.random_checkpoint import (
    INT4,
    NUM_SPECIALS,
    Case,
    linear_shapes,
    random_tensors,
    stored_int4,
    write,
)
from tests.reference import PREFIXES, Mistakes, Reference

SAME = 2e-5  # relative error between two right programs in fp32, with a margin
CLEARLY = 0.02  # the least a mistake must change
LENGTH = 96
GREEDY = SamplingParams(temperature=0, max_tokens=16)

# Kimi K2.5 with every width made small, and the original context with it, so that these prompts run past its end.
TEXT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "n_routed_experts": 32,
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
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "vocab_size": 2 * NUM_SPECIALS,
    "max_position_embeddings": 4096,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 64.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": NUM_SPECIALS,
    "eos_token_id": NUM_SPECIALS + 1,
    "pad_token_id": 2 * NUM_SPECIALS - 1,
    "quantization_config": INT4,
}
IM_END = NUM_SPECIALS + 2


def kimi_config(**changes: Any) -> dict[str, Any]:
    """config.json of the small Kimi, with `changes` to its text part."""
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "eos_token_id": TEXT["eos_token_id"],
        "text_config": copy.deepcopy(TEXT) | changes,
    }


def make(directory: Path, raw: dict[str, Any], tensors: dict[str, Tensor], prefix: str = PREFIXES[0]) -> Case:
    write(directory, raw, tensors, prefix)
    return Case(directory, raw, ModelConfig.from_dict(raw), tensors)


def load(case: Case, activations: str = "float32", **options: Any) -> Kimi:
    return Kimi.load(case.path, dtype="float32", activations=activations, threads=1, ctx=512, **options)


def logits_of(case: Case, token_ids: list[int], **options: Any) -> Tensor:
    with load(case, **options) as kimi:
        return kimi.logits(token_ids)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Subject:
    """The small Kimi on disk, a prompt, the right logits and the runtime's."""

    case: Case
    token_ids: list[int]
    right: Tensor
    ours: Tensor

    def assert_would_notice(self, mistakes: Mistakes, clearly: float = CLEARLY) -> None:
        wrong = Reference(self.case.config, self.case.tensors, mistakes=mistakes).logits(self.token_ids)
        assert difference(wrong, self.right) > clearly
        assert difference(self.ours, self.right) < SAME


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    raw = kimi_config()
    case = make(tmp_path_factory.mktemp("pitfalls") / "model", raw, random_tensors(raw, 0))
    token_ids, right = settled_tokens(case, 0, LENGTH)
    yield Subject(case, token_ids, right, logits_of(case, token_ids))


# -- attention and positions ------------------------------------------------------------------------------------------


def test_softmax_scale_includes_the_square_of_yarns_temperature(subject: Subject) -> None:
    subject.assert_would_notice(Mistakes(softmax_without_mscale=True))
    assert subject.case.config.softmax_scale == pytest.approx(96**-0.5 * (0.1 * math.log(64) + 1) ** 2)


def test_rotated_pairs_are_adjacent_not_half_apart(subject: Subject) -> None:
    subject.assert_would_notice(Mistakes(half_split_rope=True))


def test_beta_fast_is_32_as_configured_not_k2_thinkings_1(subject: Subject) -> None:
    subject.assert_would_notice(Mistakes(beta_fast=1.0))


def test_yarn_is_on_for_short_prompts_too(subject: Subject) -> None:
    short = dataclasses.replace(subject, token_ids=subject.token_ids[:48], right=subject.right[:48],
                                ours=logits_of(subject.case, subject.token_ids[:48]))  # fmt: skip
    short.assert_would_notice(Mistakes(yarn_off_in_short_prompts=True))


def test_eps_is_read_from_the_configuration(tmp_path: Path) -> None:
    raw = kimi_config(rms_norm_eps=0.05)
    case = make(tmp_path / "model", raw, random_tensors(raw, 0))
    token_ids, right = settled_tokens(case, 0, LENGTH)
    usual = Reference(dataclasses.replace(case.config, rms_norm_eps=1e-6), case.tensors)
    assert difference(usual.logits(token_ids), right) > CLEARLY
    assert difference(logits_of(case, token_ids), right) < SAME


# -- router -----------------------------------------------------------------------------------------------------------


def test_router_stays_in_fp32(subject: Subject) -> None:
    subject.assert_would_notice(Mistakes(router_in_bf16=True))


def test_router_stays_in_fp32_when_the_model_runs_in_bf16(subject: Subject) -> None:
    """The gate and its bias are kept to the last bit: rounding the bias alone changes which experts are chosen."""
    with Kimi.load(subject.case.path, dtype="bfloat16", threads=1, ctx=128) as kimi:
        routers = [block.ffn.router for block in kimi._engine.model.blocks[1:]]  # type: ignore[union-attr]
    for layer, router in enumerate(routers, start=1):
        bias = subject.case.tensors[f"layers.{layer}.mlp.gate.e_score_correction_bias"]
        assert router.weight.dtype == torch.float32
        assert router.bias is not None and torch.equal(router.bias, bias)
        assert not torch.equal(bias, bias.bfloat16().float())


def test_the_correction_bias_chooses_but_does_not_weigh(subject: Subject) -> None:
    subject.assert_would_notice(Mistakes(bias_in_weights=True))


def test_routed_experts_are_scaled(subject: Subject) -> None:
    subject.assert_would_notice(Mistakes(routed_scaling_forgotten=True))


def test_the_shared_expert_is_not_scaled(subject: Subject) -> None:
    subject.assert_would_notice(Mistakes(shared_expert_scaled=True))


# -- int4 -------------------------------------------------------------------------------------------------------------


def test_nibbles_are_offset_binary_not_twos_complement(subject: Subject) -> None:
    subject.assert_would_notice(Mistakes(nibbles="twos_complement"))


def test_the_low_nibble_comes_first(subject: Subject) -> None:
    subject.assert_would_notice(Mistakes(nibbles="high_first"))


def test_int4_means_weight_packed_exists_whatever_the_ignore_list_says(tmp_path: Path) -> None:
    """Attention and router are plain though nothing excludes them; a shared expert is packed though a pattern does."""
    raw = kimi_config(num_hidden_layers=2)
    raw["text_config"]["quantization_config"] = copy.deepcopy(INT4) | {"ignore": ["re:.*shared_experts.*"]}
    tensors = random_tensors(raw, 0)
    rng = torch.Generator().manual_seed(0)
    for name, out, width, gain in linear_shapes(raw["text_config"]):
        if "shared_experts" in name:
            del tensors[f"{name}.weight"]
            tensors |= stored_int4(name, out, width, gain, rng)
            # Powers of two: the products are exact even in bf16, to which all but routed experts are decoded.
            scale = tensors[f"{name}.weight_scale"].float()
            tensors[f"{name}.weight_scale"] = torch.exp2(scale.log2().round()).bfloat16()
    case = make(tmp_path / "model", raw, tensors)
    token_ids, right = settled_tokens(case, 0, LENGTH)
    assert difference(logits_of(case, token_ids), right) < SAME


def test_a_layer_of_plain_experts_in_a_quantized_model(tmp_path: Path) -> None:
    raw = kimi_config()
    tensors = random_tensors(raw, 0)
    plain = kimi_config()
    del plain["text_config"]["quantization_config"]
    layer = "layers.1.mlp.experts."
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(layer)}
    tensors |= {name: tensor for name, tensor in random_tensors(plain, 1).items() if name.startswith(layer)}
    case = make(tmp_path / "model", raw, tensors)
    token_ids, right = settled_tokens(case, 0, LENGTH)
    assert difference(logits_of(case, token_ids), right) < SAME


def test_the_image_tower_is_plain_and_in_nobodys_way(subject: Subject, tmp_path: Path) -> None:
    vision = {"patch_size": 14, "vt_num_hidden_layers": 1, "vt_hidden_size": 32, "vt_num_attention_heads": 2,
              "vt_intermediate_size": 48, "init_pos_emb_height": 4, "init_pos_emb_width": 4, "init_pos_emb_time": 4,
              "merge_kernel_size": [2, 2], "mm_hidden_size": 32, "text_hidden_size": 128}  # fmt: skip
    shapes = {"patch_embed.proj": (32, 3, 14, 14), "encoder.final_layernorm": (32,)}
    block = {"norm0": (32,), "norm1": (32,), "wqkv": (96, 32), "wo": (32, 32), "mlp.fc0": (48, 32), "mlp.fc1": (32, 48)}
    shapes |= {f"encoder.blocks.0.{name}": shape for name, shape in block.items()}
    affine = {f"vision_tower.{name}": shape for name, shape in shapes.items()}
    affine |= {"mm_projector.pre_norm": (32,), "mm_projector.proj.0": (128, 128), "mm_projector.proj.2": (128, 128)}
    images = {f"{name}.weight": torch.ones(shape) for name, shape in affine.items()}
    images |= {f"{name}.bias": torch.ones(shape[:1]) for name, shape in affine.items()}
    images["vision_tower.patch_embed.pos_emb.weight"] = torch.ones(4, 4, 32)
    raw = subject.case.raw | {"vision_config": vision}
    tensors = subject.case.tensors | {name: tensor.bfloat16() for name, tensor in images.items()}
    case = make(tmp_path / "model", raw, tensors)
    assert torch.equal(logits_of(case, subject.token_ids), subject.ours)


# -- one path for prompts, another for answers ------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_prefill_of_a_long_prompt_equals_decoding_it(activations: str, tmp_path: Path) -> None:
    """300 tokens: several cache pages, and more than one chunk of prefill. Every expert runs, so no choice can flip."""
    raw = kimi_config(n_routed_experts=8, num_experts_per_tok=8, num_hidden_layers=2)
    case = make(tmp_path / "model", raw, random_tensors(raw, 0))
    token_ids = [(7 * i + i // 5) % case.config.vocab_size for i in range(300)]
    decoded = logits_of(case, token_ids, activations=activations, prefill_chunk=1)
    # A last-bit difference in an activation may round to the next of its 127 steps.
    tolerance = SAME if activations == "float32" else 2e-3
    for chunk in (256, 100):
        prefilled = logits_of(case, token_ids, activations=activations, prefill_chunk=chunk)
        assert difference(prefilled, decoded) < tolerance


# -- what ends an answer ----------------------------------------------------------------------------------------------


def test_stops_at_im_end_though_the_configuration_names_only_eos(subject: Subject, tmp_path: Path) -> None:
    with load(subject.case) as kimi:
        ids = list(kimi.generate(subject.token_ids, GREEDY))
        assert {IM_END, TEXT["eos_token_id"]} <= kimi.stop_ids
        assert kimi.default_params(thinking=False).stop_ids == kimi.stop_ids
    at = next(i for i, token in enumerate(ids) if i >= 4 and token not in ids[:i])
    # From here on <|im_end|> wins wherever that token would have.
    tensors = dict(subject.case.tensors)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    tensors["lm_head.weight"][IM_END] = 1.5 * tensors["lm_head.weight"][ids[at]]
    case = make(tmp_path / "model", subject.case.raw, tensors)
    with load(case) as kimi:
        stopping = dataclasses.replace(GREEDY, stop_ids=kimi.stop_ids)
        assert list(kimi.generate(subject.token_ids, stopping)) == [*ids[:at], IM_END]
        on_eos_only = dataclasses.replace(GREEDY, stop_ids=frozenset(kimi.config.eos_token_ids))
        assert len(list(kimi.generate(subject.token_ids, on_eos_only))) == GREEDY.max_tokens


# -- damaged weights --------------------------------------------------------------------------------------------------


DAMAGED = [
    "layers.0.self_attn.o_proj.weight",
    "layers.1.mlp.gate.weight",
    "layers.2.mlp.shared_experts.up_proj.weight",
    "layers.2.mlp.experts.*.gate_proj.weight_scale",
    "layers.2.mlp.experts.*.down_proj.weight_scale",
    "lm_head.weight",
]


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("pattern", DAMAGED)
def test_not_a_number_anywhere_is_an_error(
    pattern: str, value: float, activations: str, subject: Subject, tmp_path: Path
) -> None:
    before, _, after = pattern.partition("*")
    tensors = dict(subject.case.tensors)
    for name in tensors:
        if name.startswith(before) and name.endswith(after):
            tensors[name] = tensors[name].clone()
            tensors[name].view(-1)[::7] = value
    case = make(tmp_path / "model", subject.case.raw, tensors)
    with pytest.raises(KimiError, match="not numbers") as caught:
        logits_of(case, subject.token_ids, activations=activations)
    assert "doctor" in caught.value.remedy


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_not_a_number_in_an_answer_is_an_error_not_an_exclamation_mark(
    activations: str, subject: Subject, tmp_path: Path
) -> None:
    """Token 0, which NaN would choose, prints as "!" in Kimi's vocabulary."""
    table = subject.case.tensors["embed_tokens.weight"].clone()
    damaged = subject.token_ids[5]
    table[damaged, 3] = math.nan
    case = make(tmp_path / "model", subject.case.raw, subject.case.tensors | {"embed_tokens.weight": table})
    with load(case, activations=activations) as kimi:
        for temperature in (0.0, 1.0):
            answer = kimi.generate(subject.token_ids[:6], dataclasses.replace(GREEDY, temperature=temperature))
            with pytest.raises(KimiError, match="not numbers"):
                next(answer)
        assert damaged not in subject.token_ids[:5]
        assert list(kimi.generate(subject.token_ids[:5], dataclasses.replace(GREEDY, max_tokens=1)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_correction_bias_is_refused(value: float, subject: Subject, tmp_path: Path) -> None:
    """It only takes part in a comparison, so no output would ever be NaN."""
    name = "layers.1.mlp.gate.e_score_correction_bias"
    bias = subject.case.tensors[name].clone()
    bias[5] = value
    case = make(tmp_path / "model", subject.case.raw, subject.case.tensors | {name: bias})
    with pytest.raises(CheckpointError, match=name):
        load(case)


# -- names and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [*PREFIXES, "model.language_model."])
def test_any_prefix_in_use_names_the_same_tensors(prefix: str, subject: Subject, tmp_path: Path) -> None:
    case = make(tmp_path / "model", subject.case.raw, subject.case.tensors, prefix)
    assert torch.equal(logits_of(case, subject.token_ids), subject.ours)


@pytest.mark.parametrize("name", ["model-00001-of-00002", "model-1-of-2", "pytorch_model.part1"])
def test_the_index_names_the_shards_whatever_their_width(name: str, subject: Subject, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    case = make(directory, subject.case.raw, subject.case.tensors)
    index = directory / "model.safetensors.index.json"
    released = "model-00001-of-000003.safetensors"
    assert (directory / released).exists()  # five digits of six
    (directory / released).rename(directory / f"{name}.safetensors")
    index.write_text(index.read_text().replace(released, f"{name}.safetensors"))
    assert torch.equal(logits_of(case, subject.token_ids), subject.ours)


def test_code_in_the_checkpoint_is_never_run(subject: Subject, tmp_path: Path) -> None:
    directory, trace = tmp_path / "model", tmp_path / "was-run"
    raw = subject.case.raw | {"auto_map": {"AutoModelForCausalLM": "modeling_kimi_k25.KimiK25ForConditionalGeneration",
                                           "AutoConfig": "configuration_kimi_k25.KimiK25Config"}}  # fmt: skip
    case = make(directory, raw, subject.case.tensors)
    for name in ("modeling_kimi_k25", "configuration_kimi_k25", "tokenization_kimi", "tool_declaration_ts"):
        (directory / f"{name}.py").write_text(f"open({str(trace)!r}, 'w')\n")
    with load(case) as kimi:
        assert torch.equal(kimi.logits(subject.token_ids), subject.ours)
        kimi.tokenizer.encode("text")
        kimi.count_tokens([Message("user", "text")])
    assert not trace.exists()
