"""Resident weights that a model's files keep as codes are planned with the bytes they take once loaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid.checkpoint import CheckpointWriter, open_checkpoint
from hybrid.checkpoint.hf import is_absorbed
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import Settings, quantize
from hybrid.memory import parts
from hybrid.memory.hardware import Hardware
from hybrid.memory.known import known, options_for
from hybrid.memory.plan import MemoryPlan, commands, make_plan
from hybrid.memory.stored import as_stored
from quant import int4_g32, int8_g32

GIB = 1 << 30
BOX = Hardware(kernels="avx512vnni", physical_cores=4, threads=4, ram_total=16 * GIB)
# Wide enough that matrices outweigh what the planner does not count, and rows of whole groups.
WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 64, "q_lora_rank": 64,
    "n_shared_experts": 2, "vocab_size": 1024,
}  # fmt: skip

Chosen = Callable[[str], str | None]


def release(source: Path, target: Path, chosen: Chosen) -> Path:
    """`source` with the resident matrices in "int8" or "int4" for which `chosen` says so, by their prefix."""
    files = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix != ".safetensors"}
    with open_checkpoint(source) as checkpoint, CheckpointWriter(target) as writer:
        for name in checkpoint.names():
            prefix, _, suffix = name.rpartition(".")
            is_linear = suffix == "weight" and ("_proj" in prefix or prefix == "lm_head") and ".experts." not in prefix
            kind = chosen(prefix) if is_linear and "mm_projector" not in prefix else None
            if kind is None:
                writer.add(name, checkpoint.tensor(name))
                continue
            weight = checkpoint.linear(prefix).float().numpy()
            if kind == "int8":
                codes, bits = int8_g32.encode(weight)
                writer.add_int8(prefix, codes, torch.from_numpy(bits).view(torch.bfloat16))
            else:
                packed, bits = int4_g32.encode(weight)
                codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(weight.shape).astype(np.int8) - 8
                writer.add_int4(prefix, codes, torch.from_numpy(bits).view(torch.bfloat16))
        return writer.finish({name: data for name, data in files.items() if "index" not in name})


def planned(path: Path, **asked: object) -> MemoryPlan:
    found = known(str(path))
    return make_plan(found.config, BOX, options_for(found, BOX, ctx=256, **asked))  # type: ignore[arg-type]


def resident_bytes(plan: MemoryPlan) -> int:
    names = plan.placement.weights.parts(plan.config)
    held = sum(size for name, size in plan.placement.ram.parts.items() if name in names)
    return held + plan.placement.ram.parts["embedding"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("wide") / "model", config=WIDE)


@pytest.mark.parametrize(
    ("chosen", "kind"),
    [
        (lambda prefix: "int8", "int8"),
        (lambda prefix: "int4", "int4"),
        (lambda prefix: None if prefix == "lm_head" else "int4", "int4"),
        (lambda prefix: "int8" if prefix == "lm_head" else "int4", "int4"),
        (lambda prefix: "int8" if ".shared_experts." in prefix else None, "bf16"),
        (lambda prefix: None if ".self_attn." in prefix else "int8", "int8"),
        (lambda prefix: None, "bf16"),
    ],
    ids=["int8", "int4", "head plain", "head int8", "shared experts only", "attention plain", "plain"],
)
def test_a_release_is_planned_with_its_own_bytes(wide: Path, tmp_path: Path, chosen: Chosen, kind: str) -> None:
    model = release(wide, tmp_path / "model", lambda prefix: None if is_absorbed(f"{prefix}.") else chosen(prefix))
    with open_checkpoint(model) as checkpoint:
        loaded = checkpoint.load_bytes()["resident"]
    plan = planned(model)
    assert plan.placement.resident == kind
    assert resident_bytes(plan) == pytest.approx(loaded, rel=0.005)
    assert commands(plan, "M") == ["kimi-local chat M --ctx 256"]


@pytest.mark.parametrize("resident", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("source", ["plain", "int8"])
def test_a_pack_is_planned_with_its_own_bytes(wide: Path, tmp_path: Path, source: str, resident: str) -> None:
    """A pack whose residents are "as stored" may have int8, whatever its arguments were."""
    origin = wide if source == "plain" else release(wide, tmp_path / "model", lambda _: "int8")
    pack = quantize(origin, tmp_path / "pack", Settings(mix=("trellis2", "trellis2"), resident=resident), threads=1)
    with open_checkpoint(pack) as checkpoint:
        loaded = checkpoint.load_bytes()["resident"]
    plan = planned(pack)
    assert resident_bytes(plan) == pytest.approx(loaded, rel=0.005)
    assert plan.placement.resident == ("int8" if source == "int8" else resident)


def test_codes_are_not_said_to_be_coded_anew(wide: Path, tmp_path: Path) -> None:
    model = release(wide, tmp_path / "model", lambda _: "int8")
    plan = planned(model, experts="trellis2")
    assert commands(plan, "M")[0] == "kimi-local quantize M M-pack --mix trellis2 --resident bf16", "which is as stored"


def test_residents_are_not_offered_in_fewer_bits_than_the_files_have(wide: Path, tmp_path: Path) -> None:
    """A machine that lacks a few bytes: coding plain matrices would do, and codes are what they are."""
    for model, coded in ((wide, False), (release(wide, tmp_path / "model", lambda _: "int8"), True)):
        found = known(str(model))
        options = options_for(found, BOX, ctx=256, nvme=False, experts="trellis1")
        roomy = make_plan(found.config, BOX, options).placement.ram
        short = replace(options, reserve=roomy.parts["system"] + roomy.left + 4096)
        plan = make_plan(found.config, BOX, short)
        assert not plan.fits
        assert any("--resident" in other.change for other in plan.nearest) != coded


def test_a_configuration_alone_or_with_lost_weights_is_planned_as_before(wide: Path, tmp_path: Path) -> None:
    model = release(wide, tmp_path / "model", lambda _: "int8")
    for shard in model.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:100])
    assert planned(model).placement.resident == "bf16"
    for shard in model.glob("*.safetensors"):
        shard.unlink()
    assert planned(model).placement.resident == "bf16"


def test_the_shapes_of_k25_in_codes() -> None:
    """By hand: int8 everywhere is what `resident` reckons for int8; INT4 with a head in bf16 saves less."""
    config = known("k2.5").config
    layers = [f"layers.{layer}" for layer in range(61)]
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    linears = [f"{at}.self_attn.{name}" for at in layers for name in attention]
    linears += [f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    linears += [f"{at}.mlp.shared_experts.{name}_proj" for at in layers[1:] for name in ("gate", "up", "down")]
    int8 = as_stored(config, {f"{prefix}.weight_int8" for prefix in [*linears, "lm_head"]})
    assert int8 == ("int8", parts.resident(config, "int8"))
    int4 = as_stored(config, {f"{prefix}.weight_packed" for prefix in linears})
    assert int4 is not None and int4[1].head == parts.resident(config, "bf16").head
    assert int4[1].attention == parts.resident(config, "int4").attention
    assert as_stored(config, {f"{prefix}.weight" for prefix in linears}) is None
