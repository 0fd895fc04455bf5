"""The slow reference against transformers' native classes, and against numbers worked out by hand."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.config import ModelConfig
from tests.model.oracle import settled_tokens, transformers_logits, transformers_model
from tests.model.random_checkpoint import SEEDS, make_case, pack_int4, random_config, text_of, write
from tests.reference import PREFIXES, Reference, inverse_frequencies, read_tensors, unpack_int4, yarn_mscale

LENGTH = 96  # past the original context of every YaRN configuration here

# Kimi K2.5's own numbers; the sizes that do not matter for them are small.
KIMI = {
    "model_type": "kimi_k2",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 12,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.827,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "vocab_size": 512,
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
}


@pytest.mark.parametrize("seed", SEEDS)
def test_reference_equals_transformers(seed: int, tmp_path: Path) -> None:
    case = make_case(tmp_path, seed)
    ids, logits = settled_tokens(case, seed, LENGTH)
    other = transformers_logits(transformers_model(case), ids)
    assert logits.std() > 1
    assert (other - logits).norm() / logits.norm() < 2e-5


def test_the_random_configurations_cover_what_the_family_varies() -> None:
    raws = [random_config(random.Random(seed)) for seed in SEEDS]
    texts = [text_of(raw) for raw in raws]
    ropes: list[dict[str, Any]] = [text.get("rope_parameters") or text.get("rope_scaling") or {} for text in texts]

    def values(key: str) -> set[Any]:
        return {text[key] for text in texts}

    assert {raw["model_type"] for raw in raws} == {"kimi_k25", "kimi_k2", "deepseek_v3", "deepseek_v2"}
    assert {text.get("quantization_config", {}).get("quant_method") for text in texts} == {
        "compressed-tensors",
        "fp8",
        None,
    }
    assert values("num_hidden_layers") == {2, 3, 4, 5} and values("first_k_dense_replace") == {0, 1, 2}
    assert {8, 384} <= values("n_routed_experts") and {1, 8} <= values("num_experts_per_tok")
    assert values("n_shared_experts") == {0, 1, 2} and values("n_group") == {1, 2, 4, 8}
    assert {text["topk_method"] for text in texts} == {"noaux_tc", "greedy", "group_limited_greedy"}
    assert any(1 < text["topk_group"] < text["n_group"] for text in texts)
    assert None in values("q_lora_rank") and len(values("q_lora_rank")) > 3
    for key in ("norm_topk_prob", "tie_word_embeddings", "attention_bias"):
        assert values(key) == {True, False}
    assert {text.get("rope_interleave", True) for text in texts} == {True, False}
    assert len(values("rms_norm_eps")) == 3
    assert {"rope_scaling" in text for text in texts} == {True, False}
    assert {"factor" in rope for rope in ropes} == {True, False}
    yarns = [rope for rope in ropes if "factor" in rope]
    assert {rope["beta_fast"] for rope in yarns} == {1.0, 8.0, 32.0}
    assert len({(rope.get("mscale"), rope.get("mscale_all_dim")) for rope in yarns}) == 5
    assert all(rope["original_max_position_embeddings"] < LENGTH for rope in yarns)


def test_nibbles_are_offset_binary_least_significant_first() -> None:
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert unpack_int4(word).tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1]]
    assert unpack_int4(word, "twos_complement").tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert unpack_int4(word, "high_first").tolist() == [[-1, -2, -3, -4, -5, -6, -7, -8]]
    codes = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


def test_yarn_frequencies_of_kimi_k25() -> None:
    config = ModelConfig.from_dict(KIMI)
    plain = inverse_frequencies(dataclasses.replace(config, rope_scaling=None))
    stretched = inverse_frequencies(config)
    kept = {8: 1.0, 9: 0.91796875, 12: 0.671875, 16: 0.34375, 19: 0.09765625, 20: 1 / 64, 31: 1 / 64}
    assert torch.equal(stretched[:9], plain[:9])
    for i, share in kept.items():
        assert stretched[i] / plain[i] == pytest.approx(share, rel=1e-12)
    absolute = {8: 0.06687403050, 20: 1.8070233868e-05, 31: 4.382206456e-07}
    assert stretched[list(absolute)].tolist() == pytest.approx(list(absolute.values()), rel=1e-9)


def test_temperatures_of_kimi_k25() -> None:
    reference = Reference(ModelConfig.from_dict(KIMI), {})
    assert yarn_mscale(64, 1.0) == pytest.approx(1.4158883083)
    assert reference.softmax_scale() == pytest.approx(0.1446796258)
    assert reference.rotations(3).abs().unique().tolist() == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("mscale", "all_dim", "rotary", "softmax"),
    [
        (1.0, 1.0, lambda m: 1.0, lambda m: m(1.0) ** 2),
        (0.707, 0.707, lambda m: 1.0, lambda m: m(0.707) ** 2),
        (0.707, 1.0, lambda m: m(0.707) / m(1.0), lambda m: m(1.0) ** 2),
        (0.707, 0.0, lambda m: m(0.707), lambda m: 1.0),
        (None, None, lambda m: m(1.0), lambda m: 1.0),
    ],
)
def test_either_mscale_does_its_own_part(
    mscale: float | None, all_dim: float | None, rotary: Callable[..., float], softmax: Callable[..., float]
) -> None:
    yarn = {**KIMI["rope_scaling"], "mscale": mscale, "mscale_all_dim": all_dim}  # type: ignore[dict-item]
    reference = Reference(ModelConfig.from_dict(KIMI | {"rope_scaling": yarn}), {})
    assert reference.rotations(2).abs().max() == pytest.approx(rotary(lambda s: yarn_mscale(64.0, s)))
    assert reference.softmax_scale() == pytest.approx(192**-0.5 * softmax(lambda s: yarn_mscale(64.0, s)))


def test_router_weights_sum_to_the_scaling_factor() -> None:
    config, rng = ModelConfig.from_dict(KIMI), torch.Generator().manual_seed(1)
    bias = torch.zeros(12)
    bias[3], bias[4] = 10.0, -10.0
    tensors = {"gate.weight": torch.randn(12, 64, generator=rng), "gate.e_score_correction_bias": bias}
    token = torch.randn(64, generator=rng, dtype=torch.float64)
    reference = Reference(config, {f"x.{name}": tensor for name, tensor in tensors.items()})
    chosen = dict(reference.route("x", token))
    assert len(chosen) == 8 and 3 in chosen and 4 not in chosen
    assert sum(chosen.values()) == pytest.approx(2.827)
    scores = torch.sigmoid(tensors["gate.weight"].double() @ token)
    assert chosen[3] == pytest.approx(2.827 * float(scores[3] / scores[list(chosen)].sum()))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_reading_back_what_was_written(prefix: str, tmp_path: Path) -> None:
    case = make_case(tmp_path / "first", 3)
    write(tmp_path / "again", case.raw, case.tensors, prefix)
    found = read_tensors(tmp_path / "again")
    assert found.keys() == case.tensors.keys()
    assert all(torch.equal(found[name].view(torch.uint8), case.tensors[name].view(torch.uint8)) for name in found)
