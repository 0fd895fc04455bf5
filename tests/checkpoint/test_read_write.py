"""What CheckpointWriter writes, other readers understand; what others write, open_checkpoint understands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from hybrid.checkpoint import CheckpointWriter, Int4Weight, open_checkpoint
from hybrid.checkpoint.hf import decode_fp8, decode_int4
from hybrid.checkpoint.tiny import make_tiny, quantize_fp8, quantize_int4
from hybrid.checkpoint.write import CHECKSUMS, INDEX, pack_int4, write_header
from hybrid.errors import CheckpointError

PROJECTION = "layers.1.mlp.experts.3.down_proj"


def read_with_library(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory as the safetensors library reads it, by stored name."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(shard)
    return tensors


def naive_int4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The layout spelt out: eight nibbles per word from the lowest, offset 8, one scale per 32 columns."""
    rows, words = packed.shape
    result = torch.zeros(rows, words * 8)
    for row in range(rows):
        for column in range(words * 8):
            word = int(packed[row, column // 8]) & 0xFFFFFFFF
            code = (word >> 4 * (column % 8) & 15) - 8
            result[row, column] = code * float(scales[row, column // 32])
    return result


def test_the_published_test_word() -> None:
    codes = np.arange(-8, 0, dtype=np.int8)[None]
    assert pack_int4(codes)[0, 0] == 0x76543210
    word = Int4Weight(np.tile(np.int32(0x76543210), 4).view(np.uint8)[None], np.array([[0x3F80]], np.uint16))
    assert decode_int4(word).float()[0, :8].tolist() == list(range(-8, 0))


def test_the_safetensors_library_reads_the_same_tensors(tiny: Path) -> None:
    library = read_with_library(tiny)
    index = json.loads((tiny / INDEX).read_text())
    assert set(index["weight_map"]) == set(library)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in library.values())
    with open_checkpoint(tiny) as checkpoint:
        assert len(checkpoint.names()) == len(library)
        for stored, expected in library.items():
            name = stored.removeprefix("language_model.").removeprefix("model.")
            found = checkpoint.tensor(name)
            assert found.dtype == expected.dtype and torch.equal(found, expected), stored


def test_int4_experts_are_views_that_decode_as_documented(tiny: Path) -> None:
    library = read_with_library(tiny)
    with open_checkpoint(tiny) as checkpoint:
        assert checkpoint.expert_format(1) == "int4_g32"
        down = checkpoint.expert(1, 3).down
        assert isinstance(down, Int4Weight)
        assert down.packed.dtype == np.uint8 and down.packed.shape == (128, 32)
        assert down.scales.dtype == np.uint16 and down.scales.shape == (128, 2)
        stored = f"language_model.model.{PROJECTION}"
        expected = naive_int4(library[f"{stored}.weight_packed"], library[f"{stored}.weight_scale"])
        assert torch.equal(checkpoint.linear(PROJECTION), expected.to(torch.bfloat16))
        assert library[f"{stored}.weight_shape"].tolist() == [128, 64]


def test_views_share_memory_and_never_reach_the_file(tiny: Path) -> None:
    before = (tiny / "model-00001-of-000001.safetensors").read_bytes()
    with open_checkpoint(tiny) as checkpoint:
        first, second = checkpoint.expert(1, 0).gate, checkpoint.expert(1, 0).gate
        assert isinstance(first, Int4Weight) and isinstance(second, Int4Weight)
        assert np.shares_memory(first.packed, second.packed)
        assert first.packed.flags.writeable and first.packed.flags.aligned and first.scales.flags.c_contiguous
        first.packed[0, 0] ^= 0xFF
        assert second.packed[0, 0] == first.packed[0, 0]
    assert (tiny / "model-00001-of-000001.safetensors").read_bytes() == before
    assert first.packed.sum() > 0  # a view outlives the checkpoint it came from


def test_larger_groups_are_repeated_to_the_kernels_group(tmp_path: Path) -> None:
    group = {"type": "int", "num_bits": 4, "group_size": 64, "strategy": "group", "symmetric": True}
    groups = {"group_0": {"weights": group}}
    spec = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    make_tiny(tmp_path / "m", config={"quantization_config": spec})
    with open_checkpoint(tmp_path / "m") as checkpoint:
        stored = checkpoint.tensor(f"{PROJECTION}.weight_scale")
        assert stored.shape == (128, 1)
        weight = checkpoint.expert(1, 3).down
        assert isinstance(weight, Int4Weight)
        assert torch.equal(torch.from_numpy(weight.scales).view(torch.bfloat16), stored.repeat(1, 2))


def test_fp8_blocks(tmp_path: Path) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 320}
    make_tiny(tmp_path / "m", experts="fp8", prefix="model.", config=sizes)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.expert_format(1) == "bf16"
        weight = checkpoint.tensor("layers.0.mlp.up_proj.weight")
        scales = checkpoint.tensor("layers.0.mlp.up_proj.weight_scale_inv")
        assert weight.dtype == torch.float8_e4m3fn and scales.shape == (3, 2)
        expected = weight.float()
        for row in range(320):
            for column in range(192):
                expected[row, column] *= scales[row // 128, column // 128]
        assert torch.equal(checkpoint.linear("layers.0.mlp.up_proj"), expected.to(torch.bfloat16))
        gate = checkpoint.expert(2, 1).gate
        assert isinstance(gate, torch.Tensor) and gate.dtype == torch.bfloat16


def test_quantizers_round_to_nearest() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32)
    codes, scales = quantize_int4(weight)
    decoded = codes.reshape(6, 3, 32) * scales.float().numpy()[:, :, None]
    step = scales.float().numpy()[:, :, None]
    assert np.all(np.abs(decoded - weight.reshape(6, 3, 32)) <= step * 0.55)
    fp8, blocks = quantize_fp8(torch.from_numpy(weight), (4, 64))
    assert blocks.shape == (2, 2)
    error = (decode_fp8(fp8, blocks, (4, 64)).float() - torch.from_numpy(weight)).abs()
    assert torch.all(error <= torch.from_numpy(np.abs(weight)) * 0.07 + 1e-3)


@pytest.mark.parametrize("prefix", ["language_model.model.", "language_model.", "model.", "", "model.language_model."])
def test_every_prefix_gives_the_same_names(tmp_path: Path, tiny: Path, prefix: str) -> None:
    make_tiny(tmp_path / "m", prefix=prefix)
    with open_checkpoint(tmp_path / "m") as checkpoint, open_checkpoint(tiny) as reference:
        assert sorted(checkpoint.names()) == sorted(reference.names())
        for name in ("embed_tokens.weight", "lm_head.weight", "layers.1.mlp.gate.e_score_correction_bias"):
            assert torch.equal(checkpoint.tensor(name), reference.tensor(name))


def test_a_single_file_without_index_and_old_rotary_tables(tmp_path: Path) -> None:
    source = make_tiny(tmp_path / "a", experts="bf16", prefix="model.")
    tensors = read_with_library(source)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    (tmp_path / "b").mkdir()
    safetensors.torch.save_file(tensors, tmp_path / "b" / "model.safetensors")
    (tmp_path / "b" / "config.json").write_bytes((source / "config.json").read_bytes())
    with open_checkpoint(tmp_path / "b") as checkpoint:
        assert not any("inv_freq" in name for name in checkpoint.names())
        assert checkpoint.expert_format(1) == "bf16"
        gate = checkpoint.expert(1, 0).gate
        assert isinstance(gate, torch.Tensor)
        assert torch.equal(gate, tensors["model.layers.1.mlp.experts.0.gate_proj.weight"])


def test_misaligned_tensors_are_copied_not_misread(tmp_path: Path, tiny: Path) -> None:
    """A legal file may put a tensor at an odd offset."""
    library = read_with_library(tiny)
    order = [("odd", torch.zeros(3, dtype=torch.uint8)), *library.items()]
    entries: dict[str, Any] = {}
    blob = b""
    dtypes = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32", torch.uint8: "U8"}
    for name, tensor in order:
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(blob), len(blob) + len(data)]
        entries[name] = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        blob += data
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    with (tmp_path / "model.safetensors").open("wb") as file:
        write_header(file, entries)
        file.write(blob)
    with open_checkpoint(tmp_path) as crooked, open_checkpoint(tiny) as straight:
        for name in straight.names():
            assert torch.equal(crooked.tensor(name), straight.tensor(name)), name
        ours, theirs = crooked.expert(2, 5), straight.expert(2, 5)
        assert all(np.array_equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


def test_generation_config_adds_stop_ids(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        ranks = checkpoint.config.vocab_size - 256
        assert checkpoint.config.eos_token_ids == (ranks + 1, ranks + 2)
        assert checkpoint.generation_config["eos_token_id"] == ranks + 2
        assert checkpoint.raw_config["text_config"]["model_type"] == "kimi_k2"


def test_load_bytes_count_what_memory_will_hold(tmp_path: Path, tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        config = checkpoint.config
        sizes = checkpoint.load_bytes()
        assert sizes["routed_experts"] == config.num_experts * config.expert_bytes()
        norms = 7 * 128 + 3 * (48 + 32)
        router = 2 * (8 * 128 + 8)
        assert sizes["resident"] == 2 * (config.resident_params - 2 * 8 * 128 + norms) + 4 * router
        assert checkpoint.load_bytes(4)["resident"] == 4 * (config.resident_params + norms + 2 * 8)
    make_tiny(tmp_path / "m", experts="fp8", prefix="model.")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.load_bytes()["routed_experts"] == config.num_experts * config.expert_bytes(16)


@pytest.fixture
def writer(tmp_path: Path) -> CheckpointWriter:
    return CheckpointWriter(tmp_path / "out", max_shard_bytes=1000)


def test_shards_are_streamed_numbered_and_bounded(writer: CheckpointWriter) -> None:
    for i in range(10):
        writer.add(f"layers.{i}.input_layernorm.weight", torch.full((200,), i, dtype=torch.bfloat16))
    assert len(list(writer.staging.iterdir())) == 4  # full shards are on disk before the end
    directory = writer.finish({"config.json": "{}"})
    shards = sorted(directory.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-{i:05}-of-000005.safetensors" for i in range(1, 6)]
    assert all(torch.all(t == int(name.split(".")[3])) for name, t in read_with_library(directory).items())
    assert json.loads((directory / CHECKSUMS).read_text())["algorithm"] == "crc32"


def test_nothing_is_visible_before_finish_and_nothing_stays_after_abort(writer: CheckpointWriter) -> None:
    writer.add("norm.weight", torch.ones(600, dtype=torch.bfloat16))
    writer.add("lm_head.weight", torch.ones(600, dtype=torch.bfloat16))
    assert not writer.directory.exists()
    with pytest.raises(ValueError, match="stop"), writer:
        raise ValueError("stop")
    assert list(writer.directory.parent.iterdir()) == []


def test_existing_directories_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with CheckpointWriter(tmp_path / "empty") as writer:
        writer.add("norm.weight", torch.ones(2))
        writer.finish({})
    with pytest.raises(CheckpointError, match="already exists"):
        CheckpointWriter(tmp_path / "empty")


def test_scalars_and_vision_names(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m") as writer:
        writer.add("vision_tower.patch_embed.proj.bias", torch.tensor(2.5))
        writer.add("lm_head.weight", torch.ones(1, 1))
        writer.add("norm.weight", torch.ones(0))
        writer.finish({"note.txt": b"bytes"})
    library = read_with_library(tmp_path / "m")
    assert library["vision_tower.patch_embed.proj.bias"].shape == ()
    assert set(library) == {
        "vision_tower.patch_embed.proj.bias",
        "language_model.lm_head.weight",
        "language_model.model.norm.weight",
    }
    assert (tmp_path / "m" / "note.txt").read_bytes() == b"bytes"


@pytest.mark.parametrize(
    "config",
    [
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"n_shared_experts": 0},
        {"n_routed_experts": 0},
        {"n_group": 4, "topk_group": 2},
        {"num_hidden_layers": 5, "first_k_dense_replace": 0, "moe_layer_freq": 2},
        {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy"},
        {"dtype": "float32"},
    ],
    ids=lambda config: ",".join(config),
)
def test_shapes_follow_the_configuration(tmp_path: Path, config: dict[str, Any]) -> None:
    make_tiny(tmp_path / "m", experts="bf16", prefix="model.", config=config)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        names = set(checkpoint.names())
        assert ("layers.0.self_attn.q_proj.weight" in names) == (checkpoint.config.q_lora_rank is None)
        assert ("lm_head.weight" in names) == (not checkpoint.config.tie_word_embeddings)
        routers = {int(name.split(".")[1]) for name in names if name.endswith("mlp.gate.weight")}
        assert routers == set(checkpoint.config.moe_layers)
        biases = any(name.endswith("e_score_correction_bias") for name in names)
        assert biases == (checkpoint.config.topk_method == "noaux_tc" and checkpoint.config.num_experts > 0)


def test_an_absent_tensor_is_named(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint, pytest.raises(CheckpointError, match="no tensor layers.9.x"):
        checkpoint.tensor("layers.9.x")


def test_released_memory_is_read_again(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        name = "layers.0.self_attn.o_proj.weight"
        tensor = checkpoint.tensor(name)
        before = tensor.clone()
        checkpoint.release()
        assert torch.equal(tensor, before) and torch.equal(checkpoint.tensor(name), before)
