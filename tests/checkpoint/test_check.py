"""The header-only check: the released layout at full size, and every planted deviation named."""

import importlib.util
import re
import resource
from pathlib import Path
from typing import Any

import pytest

from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.check import Finding, check_headers, scan
from hybrid.checkpoint.tiny import make_tiny
from hybrid.checkpoint.write import INDEX
from hybrid.errors import CheckpointError
from tests.checkpoint import damage

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizer"
SMALL = {
    "num_hidden_layers": 3,
    "n_routed_experts": 16,
    "hidden_size": 256,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
}
LAYER = "language_model.model.layers.2"
EXPERT = f"{LAYER}.mlp.experts.7"


def make_hollow(directory: Path, *plants: str, config: dict[str, Any] | None = None) -> None:
    """The developers' tool, called in this process."""
    spec = importlib.util.spec_from_file_location("make_hollow", ROOT / "tools" / "make_hollow.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.make_hollow(directory, config or {}, plants, TOKENIZER if TOKENIZER.is_dir() else None)


def errors(path: Path) -> list[Finding]:
    return [finding for finding in check_headers(path) if finding.severity == "error"]


@pytest.mark.slow
def test_the_released_layout_at_full_size(tmp_path: Path) -> None:
    plants = [
        "missing:language_model.model.layers.33.mlp.experts.383.down_proj.weight_scale",
        "extra:language_model.model.layers.5.mlp.experts.384.up_proj.weight_packed",
        "name:language_model.model.layers.60.self_attn.o_proj.weight=language_model.model.layers.60.attn.o_proj.weight",
        "shape:language_model.model.layers.17.mlp.experts.12.gate_proj.weight_packed",
        "dtype:language_model.model.layers.9.mlp.gate.e_score_correction_bias=BF16",
        "dtype:vision_tower.encoder.blocks.26.wqkv.weight=F32",
        "shape:mm_projector.proj.2.weight",
        "index:language_model.lm_head.weight=model-00001-of-000064.safetensors",
    ]
    make_hollow(tmp_path / "whole")
    whole = scan(tmp_path / "whole")
    assert (whole.num_tensors, whole.num_bytes, len(whole.headers)) == (208_550, 595_148_192_736, 64)
    assert {finding.where for finding in whole.findings} <= {"tiktoken.model", "tokenizer_config.json"}
    assert whole.load_bytes()["routed_experts"] == 570_760_888_320
    del whole
    make_hollow(tmp_path / "planted", *plants)
    named = " ".join(map(str, errors(tmp_path / "planted")))
    for plant in plants:
        for name in plant.partition(":")[2].split("=")[:1]:
            assert name in named
    assert len(errors(tmp_path / "planted")) == len(plants) + 1  # a misspelt tensor is one missing and one unexpected
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2_000_000  # kB


PLANTED = {
    f"missing:{EXPERT}.up_proj.weight_packed": ["missing (the index places it in model-00003-of-000006.safetensors)"],
    f"missing:{LAYER}.self_attn.kv_a_layernorm.weight": ["missing (the index"],
    "missing:vision_tower.patch_embed.pos_emb.weight": ["missing (the index"],
    f"extra:{EXPERT}.up_proj.weight_zero_point": ["unexpected tensor (in model-00001-of-000006.safetensors)"],
    "extra:language_model.model.layers.61.input_layernorm.weight": ["unexpected tensor"],
    f"name:{EXPERT}.up_proj.weight_scale={EXPERT}.up_proj.weight_scales": ["missing", "unexpected tensor"],
    f"shape:{EXPERT}.down_proj.weight_packed": ["shape [8, 256], expected [256, 8]"],
    f"shape:{LAYER}.input_layernorm.weight": ["shape [256, 1], expected [256]"],
    f"dtype:{EXPERT}.gate_proj.weight_packed=U8": ["dtype U8, expected I32"],
    f"dtype:{EXPERT}.gate_proj.weight_shape=I64": ["dtype I64, expected I32"],
    f"dtype:{EXPERT}.gate_proj.weight_scale=F16": ["dtype F16, expected BF16"],
    f"dtype:{LAYER}.self_attn.q_b_proj.weight=F32": ["dtype F32, expected BF16"],
    f"dtype:{LAYER}.mlp.gate.e_score_correction_bias=BF16": ["dtype BF16, expected F32"],
    f"index:{EXPERT}.down_proj.weight_packed=model-00001-of-000006.safetensors": ["the index places it in model-00001"],
    "index:language_model.model.ghost=model-00001-of-000006.safetensors": [
        "named in the index, but not in model-00001"
    ],
}


@pytest.mark.parametrize("plant", PLANTED)
def test_each_deviation_is_named_once(tmp_path: Path, plant: str) -> None:
    make_hollow(tmp_path / "m", plant, config=SMALL)
    found = errors(tmp_path / "m")
    names = re.split("[:=]", plant)[1:]
    for finding, message in zip(found, PLANTED[plant], strict=True):
        assert finding.where in names and message in finding.message


def test_a_deviation_in_a_tensor_the_text_model_needs_stops_loading(tmp_path: Path) -> None:
    make_hollow(tmp_path / "m", f"missing:{EXPERT}.up_proj.weight_packed", config=SMALL)
    with pytest.raises(CheckpointError, match="no tensor layers.2.mlp.experts.7.up_proj.weight_packed"):
        open_checkpoint(tmp_path / "m")


def test_a_deviation_in_the_image_tower_does_not(tmp_path: Path) -> None:
    make_hollow(tmp_path / "m", "missing:mm_projector.proj.0.bias", config=SMALL)
    open_checkpoint(tmp_path / "m").close()
    assert [finding.where for finding in errors(tmp_path / "m")] == ["mm_projector.proj.0.bias"]


def test_missing_shards_are_reported_once_each(tmp_path: Path) -> None:
    make_hollow(tmp_path / "m", config=SMALL)
    for number in (2, 5):
        (tmp_path / "m" / f"model-0000{number}-of-000006.safetensors").unlink()
    found = [str(finding) for finding in errors(tmp_path / "m")]
    assert found == [
        "model-00002-of-000006.safetensors: missing shard, with 158 tensors",
        "model-00005-of-000006.safetensors: missing shard, with 6 tensors",
    ]


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    make_hollow(tmp_path / "m", f"extra:{LAYER}.input_layernorm.weight", config=SMALL)
    messages = [finding.message for finding in errors(tmp_path / "m")]
    assert any("is in model-00003-of-000006.safetensors and as" in message for message in messages)
    with pytest.raises(CheckpointError, match="is also in model-00001"):
        open_checkpoint(tmp_path / "m")


def test_what_is_only_worth_a_warning(tmp_path: Path, tiny: Path) -> None:
    model = damage.copy(tiny, tmp_path / "model")
    (model / "tiktoken.model").unlink()
    (model / "stray.safetensors").write_bytes(b"")
    damage.rewrite_json(model / INDEX, lambda index: index["metadata"].update(total_size=1))
    found = check_headers(model)
    assert {finding.severity for finding in found} == {"warning"}
    assert {finding.where for finding in found} == {"tiktoken.model", "stray.safetensors", INDEX}


def test_prediction_layers_and_absent_vision_are_no_errors(tmp_path: Path, tiny: Path) -> None:
    source = make_tiny(tmp_path / "m", prefix="model.", experts="bf16", config={"num_hidden_layers": 4})

    def three_layers(config: dict[str, Any]) -> None:
        config.update(num_hidden_layers=3, num_nextn_predict_layers=1)

    damage.rewrite_json(source / "config.json", three_layers)
    assert [finding.severity for finding in check_headers(source)] == ["note"]
    open_checkpoint(source).close()
    model = damage.copy(tiny, tmp_path / "blind")
    vision = {"patch_size": 14, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"pos_emb_height": 4, "pos_emb_width": 4}
    damage.rewrite_json(model / "config.json", lambda config: config.update(vision_config=vision))
    assert [(finding.severity, finding.where) for finding in check_headers(model)] == [("warning", "vision_tower")]


def test_an_incomplete_vision_config_is_named(tmp_path: Path, tiny: Path) -> None:
    model = damage.copy(tiny, tmp_path / "model")
    damage.rewrite_json(model / "config.json", lambda config: config.update(vision_config={"patch_size": 14}))
    with pytest.raises(CheckpointError, match="vision_config lacks vt_hidden_size"):
        check_headers(model)


def test_names_cannot_drive_the_terminal(tmp_path: Path, tiny: Path) -> None:
    model = damage.copy(tiny, tmp_path / "model")

    def rename(header: dict[str, Any]) -> None:
        header["\x1b[31mred\n"] = header.pop("language_model.model.norm.weight")

    damage.rewrite_header(model / damage.SHARD, rename)
    text = " ".join(map(str, check_headers(model)))
    assert "\\x1b[31mred\\n" in text and "\x1b" not in text and "\n" not in text
