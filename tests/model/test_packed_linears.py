"""Resident linears kept in int8 or INT4: what is read, what is kept, and what the model then computes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid import Kimi
from hybrid.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from hybrid.checkpoint.check import check_headers
from hybrid.checkpoint.expected import layer_linears
from hybrid.checkpoint.hf import Int4Weight, Int8Weight
from hybrid.checkpoint.tiny import make_tiny
from hybrid.errors import CheckpointError
from hybrid.model.layers import Linear, PackedLinear, Weights
from quant import int4_g32, int8_g32, linear
from tests.checkpoint import damage

CPU = torch.device("cpu")
IDS = list(range(5, 60, 3))
DENSE = {"n_routed_experts": 0, "q_lora_rank": 64, "attention_bias": True}  # no expert's choice hangs on rounding
MOE = {"q_lora_rank": 64}
O_PROJ, KV_B = "layers.1.self_attn.o_proj", "layers.1.self_attn.kv_b_proj"
SHARED = "layers.1.mlp.shared_experts.up_proj"

Add = Callable[[CheckpointWriter, str, np.ndarray], None]


def add_int8(writer: CheckpointWriter, prefix: str, weight: np.ndarray) -> None:
    codes, bits = int8_g32.encode(weight)
    writer.add_int8(prefix, codes, torch.from_numpy(bits).view(torch.bfloat16))


def add_int4(writer: CheckpointWriter, prefix: str, weight: np.ndarray) -> None:
    packed, bits = int4_g32.encode(weight)
    codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(weight.shape).astype(np.int8) - 8
    writer.add_int4(prefix, codes, torch.from_numpy(bits).view(torch.bfloat16))


ADD: dict[str, Add] = {"int8": add_int8, "int4": add_int4}


def rewrite(source: Path, target: Path, add: Add) -> Path:
    """A copy of a checkpoint, with every resident linear of its text model given to `add`."""
    files = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix != ".safetensors"}
    with open_checkpoint(source) as checkpoint, CheckpointWriter(target) as writer:
        residents = resident_linears(checkpoint)
        for name in checkpoint.names():
            prefix, _, suffix = name.rpartition(".")
            if prefix not in residents or suffix == "bias":
                writer.add(name, checkpoint.tensor(name))
            elif suffix in ("weight", "weight_packed", "weight_int8"):
                add(writer, prefix, checkpoint.linear(prefix, torch.float32).float().numpy())
        return writer.finish({name: data for name, data in files.items() if "index" not in name})


def resident_linears(checkpoint: Checkpoint) -> set[str]:
    config = checkpoint.config
    linears = [found.prefix for n in range(config.num_hidden_layers) for found in layer_linears(config, n)]
    return {prefix for prefix in linears if ".experts." not in prefix} | {"lm_head"}


def add_decoded(writer: CheckpointWriter, prefix: str, weight: np.ndarray) -> None:
    writer.add(f"{prefix}.weight", torch.from_numpy(weight))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories: "plain", and with residents as "int8" and "int4"; models with experts are called "moe" before it."""
    root = tmp_path_factory.mktemp("packed")
    plain, moe = make_tiny(root / "plain", config=DENSE, experts="bf16"), make_tiny(root / "moe", config=MOE)
    found = {"plain": plain, "moe": moe}
    for format, add in ADD.items():
        found[format] = rewrite(plain, root / format, add)
        found[f"moe {format}"] = rewrite(moe, root / f"moe {format}", add)
    return found


def logits(path: Path, **options: str) -> Tensor:
    with Kimi.load(path, ctx=128, **options) as kimi:  # type: ignore[arg-type]
        return kimi.logits(IDS)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["int8", "int4", "moe int8", "moe int4"])
def test_headers_are_as_expected(models: dict[str, Path], name: str) -> None:
    assert check_headers(models[name]) == []
    with open_checkpoint(models[name]) as checkpoint:
        stored = {found for found in checkpoint.names() if found.endswith((".weight_int8", ".weight_packed"))}
        assert {found.rpartition(".")[0] for found in stored} >= resident_linears(checkpoint)


@pytest.mark.parametrize(("name", "kind"), [("moe int8", Int8Weight), ("moe int4", Int4Weight)])
def test_matrices_are_read_as_stored_and_decoded_exactly(models: dict[str, Path], name: str, kind: type) -> None:
    with open_checkpoint(models[name]) as checkpoint, open_checkpoint(models["moe"]) as plain:
        weight = checkpoint.matrix(SHARED)
        assert isinstance(weight, kind) and isinstance(plain.matrix(SHARED), Tensor)
        codes = checkpoint.tensor(f"{SHARED}.weight_int8") if kind is Int8Weight else nibbles(weight)
        scales = checkpoint.tensor(f"{SHARED}.weight_scale").double().repeat_interleave(32, dim=1)
        exact = codes.double() * scales
        assert torch.equal(checkpoint.linear(SHARED, torch.float32).double(), exact)
        assert torch.equal(checkpoint.linear(SHARED), exact.bfloat16())
        assert difference(exact, plain.tensor(f"{SHARED}.weight").double()) < (0.01 if kind is Int8Weight else 0.1)


def nibbles(weight: Int4Weight) -> Tensor:
    packed = torch.from_numpy(weight.packed)
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).double() - 8


@pytest.mark.parametrize(("format", "bound"), [("int8", 0.05), ("int4", 0.5)])
def test_logits_are_close_to_the_plain_models(models: dict[str, Path], format: str, bound: float) -> None:
    assert 0 < difference(logits(models[format]), logits(models["plain"])) < bound


@pytest.mark.parametrize("format", ADD)
def test_kernels_and_decoded_weights_differ_by_rounding_alone(
    models: dict[str, Path], format: str, tmp_path: Path
) -> None:
    decoded = rewrite(models[format], tmp_path / "decoded", add_decoded)
    assert 0 < difference(logits(models[format]), logits(decoded)) < 0.05


@pytest.mark.parametrize("name", ["int8", "int4", "moe int8"])
def test_the_exact_path_multiplies_the_decoded_weights(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    decoded = rewrite(models[name], tmp_path / "decoded", add_decoded)
    options = {"dtype": "float32", "activations": "float32"}
    assert torch.equal(logits(models[name], **options), logits(decoded, **options))


@pytest.mark.parametrize("format", ADD)
def test_what_stays_packed(models: dict[str, Path], format: str) -> None:
    with open_checkpoint(models[format]) as checkpoint:
        weights = Weights(checkpoint, CPU, torch.bfloat16)
        packed = weights.linear(O_PROJ)
        assert isinstance(packed, PackedLinear) and weights.matrix_bytes == packed.matrix.nbytes
        x = torch.randn(3, packed.matrix.columns, generator=torch.Generator().manual_seed(0)).bfloat16()
        product = torch.from_numpy(linear.multiply_reference(packed.matrix, x.float().numpy())).bfloat16()
        assert torch.equal(packed.forward(x), product + checkpoint.tensor(f"{O_PROJ}.bias"))
        for dtype, exact in [(torch.float32, False), (torch.bfloat16, True)]:
            weights = Weights(checkpoint, CPU, dtype, exact=exact)
            decoded = weights.linear(O_PROJ)
            assert type(decoded) is Linear and torch.equal(decoded.weight, checkpoint.linear(O_PROJ, dtype))
            assert weights.matrix_bytes == decoded.weight.nbytes
        assert torch.equal(weights.matrix(KV_B), checkpoint.linear(KV_B))


@pytest.mark.parametrize("format", ADD)
def test_load_bytes_count_what_is_kept(models: dict[str, Path], format: str) -> None:
    with open_checkpoint(models[f"moe {format}"]) as checkpoint, open_checkpoint(models["moe"]) as plain:
        assert checkpoint.load_bytes(4) == plain.load_bytes(4)
        assert checkpoint.load_bytes(packed=False) == plain.load_bytes()
        shapes = {prefix: checkpoint.linear(prefix).shape for prefix in resident_linears(checkpoint)}
        bits = 8.5 if format == "int8" else 4.5
        saved = sum((16 - bits) / 8 * r * c for prefix, (r, c) in shapes.items() if "kv_b_proj" not in prefix)
        assert plain.load_bytes()["resident"] - checkpoint.load_bytes()["resident"] == saved
        assert plain.load_bytes()["routed_experts"] == checkpoint.load_bytes()["routed_experts"]


def test_a_wrong_scale_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    model = damage.copy(models["int8"], tmp_path / "model")

    def flatten(header: dict) -> None:
        entry = header[f"language_model.model.{O_PROJ}.weight_scale"]
        entry["shape"] = entry["shape"][::-1]

    damage.rewrite_header(model / damage.SHARD, flatten)
    with pytest.raises(CheckpointError, match=f"{O_PROJ}.weight_scale has shape"):
        open_checkpoint(model)


def test_routed_experts_are_not_kept_in_int8(models: dict[str, Path], tmp_path: Path) -> None:
    expert = "layers.1.mlp.experts.0.up_proj"
    with open_checkpoint(models["moe"]) as checkpoint, CheckpointWriter(tmp_path / "m") as writer:
        for name in checkpoint.names():
            if not name.startswith(expert):
                writer.add(name, checkpoint.tensor(name))
        add_int8(writer, expert, checkpoint.linear(expert).float().numpy())
        writer.finish({"config.json": (models["moe"] / "config.json").read_bytes()})
    with pytest.raises(CheckpointError, match=f"no tensor {expert}.weight_packed"):
        open_checkpoint(tmp_path / "m")
