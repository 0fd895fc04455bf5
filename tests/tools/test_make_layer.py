"""Synthetic models of full-size layers: small ones of the same make."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hybrid import Kimi, SamplingParams
from hybrid.checkpoint import Int4Weight, open_checkpoint
from hybrid.checkpoint.check import scan
from hybrid.checkpoint.expected import Spec, expected_tensors
from hybrid.checkpoint.header import read_header
from hybrid.checkpoint.hf import decode_int4
from hybrid.config import ModelConfig

TOOLS = Path(__file__).parents[2] / "tools"
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
OPTIONS = ["--experts=12", "--vocab=700", f"--config={json.dumps(SMALL)}"]


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("make_layer")


@pytest.fixture(scope="module")
def model(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    assert tool.main([str(path), "--layers=2", "--dense=1", *OPTIONS]) == 0
    return path


def of_layer(tensors: dict[str, Spec], layer: int) -> dict[str, Spec]:
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): spec for name, spec in tensors.items() if name.startswith(prefix)}


def test_a_layer_is_exactly_the_released_one(tool: ModuleType) -> None:
    hollow = importlib.import_module("make_hollow")
    released = expected_tensors(ModelConfig.from_dict(hollow.k25_config({})))
    options = tool.parse(["DIR"], {})
    raw = tool.synthetic_config(options.layers, options.dense, options.experts, options.vocab, options.config)
    ours = expected_tensors(ModelConfig.from_dict(raw))
    assert of_layer(ours, 0) == of_layer(released, 1)


def test_the_mini_model_has_the_widths_and_fits(tool: ModuleType) -> None:
    mini = importlib.import_module("make_mini")
    options = tool.parse(["DIR"], mini.SIZES)
    config = ModelConfig.from_dict(
        tool.synthetic_config(options.layers, options.dense, options.experts, options.vocab, options.config)
    )
    assert (config.num_hidden_layers, config.moe_layers) == (5, (1, 2, 3, 4))
    assert (config.n_routed_experts, config.num_experts_per_tok, config.vocab_size) == (128, 8, 20480)
    gigabytes = (config.num_experts * config.expert_bytes() + 2 * config.resident_params) / 1e9
    assert gigabytes == pytest.approx(15.4, abs=0.1)


def test_nothing_is_found_wrong_with_it(model: Path) -> None:
    found = scan(model)
    assert found.findings == []
    open_checkpoint(model).close()


def test_a_shard_holds_one_layer(model: Path) -> None:
    shards = sorted(model.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-000004.safetensors" for i in range(1, 5)]
    for layer, shard in enumerate(shards[:3]):
        assert all(f".layers.{layer}." in name for name in read_header(shard).entries)
    assert len(read_header(shards[3]).entries) == 3


def test_experts_differ_and_are_gaussian(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        weights = [weight for layer in (1, 2) for i in range(12) for weight in checkpoint.expert(layer, i)]
        matrices = [weight for weight in weights if isinstance(weight, Int4Weight)]
        decoded = np.concatenate([decode_int4(matrix).float().numpy().ravel() for matrix in matrices])
        assert len({matrix.packed.tobytes() for matrix in matrices}) == len(weights) == 72
        codes = np.concatenate([np.stack((matrix.packed & 15, matrix.packed >> 4)).ravel() for matrix in matrices])
    assert codes.min() == 1 and codes.max() == 15, "-7 to 7, as released"
    assert decoded.std() == pytest.approx(0.02, rel=0.02) and abs(decoded.mean()) < 1e-4


def test_codes_and_scales_belong_together(tool: ModuleType, model: Path) -> None:
    stream = tool.Stream.make(0)
    with open_checkpoint(model) as checkpoint:
        down = checkpoint.expert(2, 5).down
    assert isinstance(down, Int4Weight)
    starts = stream.starts("layers.2.mlp.experts.5.down_proj", 256, 64)
    exact = tool.cut(stream.values, starts * 32, 64) * tool.SIGMA
    error = np.linalg.norm(decode_int4(down).float().numpy() - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(0.1, abs=0.03), "INT4's own rounding and no more"


def test_the_same_seed_gives_the_same_bytes(tool: ModuleType, model: Path, tmp_path: Path) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        assert tool.main([str(tmp_path / name), "--layers=2", "--dense=1", f"--seed={seed}", *OPTIONS]) == 0
    for shard in model.glob("*.safetensors"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()
        assert (tmp_path / "other" / shard.name).read_bytes() != shard.read_bytes()


def test_large_tensors_are_written_in_pieces_of_the_same_rows(
    tool: ModuleType, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "PIECE", 1000)
    assert tool.main([str(tmp_path / "pieces"), "--layers=2", "--dense=1", *OPTIONS]) == 0
    for shard in model.glob("*.safetensors"):
        assert (tmp_path / "pieces" / shard.name).read_bytes() == shard.read_bytes()


def test_it_generates_and_reads_text(model: Path) -> None:
    with Kimi.load(model, threads=1, ctx=64) as kimi:
        ids = kimi.tokenizer.encode("héllo\n")
        assert kimi.tokenizer.decode(ids) == "héllo\n"
        assert len(list(kimi.generate(ids, SamplingParams(temperature=0, max_tokens=12)))) == 12
        assert kimi.tokenizer.vocab_size == kimi.config.vocab_size == 700


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--vocab=300"], 2, "vocabulary"),
        (["--vocab=163840"], 2, "vocabulary"),
        (["--experts=4"], 4, "experts per token"),
        (["--experts=100000000"], 3, "GB of disk"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_made_is_one_line_and_leaves_nothing(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    if code == 3:
        arguments = []
        monkeypatch.setattr(tool.shutil, "disk_usage", lambda path: tool.shutil._ntuple_diskusage(10, 9, 1))
    assert tool.main([str(tmp_path / "model"), *OPTIONS, *arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_exists_is_left_alone(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("text")
    assert tool.main([str(tmp_path), *OPTIONS]) == 4
    assert "already exists" in capsys.readouterr().err and (tmp_path / "mine").read_text() == "text"
