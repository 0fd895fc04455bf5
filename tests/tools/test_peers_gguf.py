"""Files for llama.cpp: what they hold, and that llama.cpp takes them."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

from hybrid.checkpoint.tiny import tiny_config
from hybrid.config import ModelConfig
from hybrid.errors import UsageError
from tests.tools.sizes import SMALL

TOOLS = Path(__file__).parents[2] / "tools"
K25 = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 5,
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 20480,
}

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python, needed by this tool only, is not installed"
)


def config_of(shape: dict[str, int]) -> ModelConfig:
    return ModelConfig.from_dict(tiny_config(shape, experts="int4", nested=True))


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("peers_gguf")


def test_names_are_the_architectures_own(tool: ModuleType) -> None:
    own = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, 5).mapping.values()
    known = {name for _, name in own}
    names = [tensor.name for tensor in tool.tensors(config_of(K25), "iq2_xxs")]
    assert len(set(names)) == len(names)
    assert {name.rpartition(".")[0] for name in names} <= known


def test_bytes_of_a_token_worked_out_by_hand(tool: ModuleType) -> None:
    expert, attention = 3 * 7168 * 2048, 1536 * (7168 + 12288) + 576 * 7168 + 8192 * 7168
    matrices = 5 * attention + 3 * 7168 * 18432 + 4 * expert  # the shared experts
    halves = 5 * 64 * 256 * 512  # of kv_b_proj
    vectors = 5 * (2 * 7168 + 1536 + 512) + 7168 + 4 * (128 * 7168 + 128)
    head = 7168 * 20480
    always = matrices * 4.5 + head * 6.5625 + halves * 5.5 + vectors * 32
    assert tool.bytes_per_token(config_of(K25), "iq2_xxs") == (always + 32 * expert * 2.0625) / 8
    stored = always + head * 4.5 + 4 * 128 * expert * 2.0625
    assert tool.total_bytes(config_of(K25), "iq2_xxs") == stored / 8
    assert stored / 8e9 == pytest.approx(6.65, abs=0.02)


def test_widths_a_type_cannot_hold_are_named(tool: ModuleType) -> None:
    with pytest.raises(UsageError, match=r"blk\.0\.attn_q_b\.weight has rows of 48; q4_K comes in blocks of 256"):
        tool.total_bytes(config_of({**SMALL, "q_lora_rank": 48}), "iq2_xxs")


def test_pieces_are_the_rows_in_order(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "PIECE", 100)
    rng = np.random.default_rng(0)
    drawn = tool.Drawn(rng.integers(0, 256, (256, 18), np.uint8), rng.integers(0, 256, 1000))
    with (tmp_path / "rows").open("wb") as file:
        drawn.tofile(file)
    assert (tmp_path / "rows").read_bytes() == drawn.pool[drawn.picks].tobytes()
    assert drawn.nbytes == 18_000


@needs_llama
def test_the_file_holds_what_was_planned(tool: ModuleType, tmp_path: Path) -> None:
    config, path = config_of(SMALL), tmp_path / "small.gguf"
    total = tool.write_gguf(path, config, "q4_K")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    planned = list(tool.tensors(config, "q4_K"))
    assert list(found) == [tensor.name for tensor in planned]
    assert sum(int(tensor.n_bytes) for tensor in found.values()) == total
    for tensor in planned:
        assert tuple(found[tensor.name].shape[::-1]) == tensor.shape
        assert found[tensor.name].tensor_type.name.lower() == tensor.type.lower()
    experts = found["blk.1.ffn_up_exps.weight"]
    weights = gguf.dequantize(experts.data, experts.tensor_type)
    assert weights.std() == pytest.approx(tool.SIGMA, rel=0.02)
    assert len({matrix.tobytes() for matrix in weights}) == config.n_routed_experts


def ask(path: Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """What tools/peers_llama.py answers, one thread."""
    command = [sys.executable, str(TOOLS / "peers_llama.py"), str(path), "1", "64", "1"]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_llama
@pytest.mark.parametrize("kind", ["iq2_xxs", "iq1_s", "q2_K", "q4_K", "mxfp4"])
def test_llama_cpp_loads_and_runs_it(tool: ModuleType, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{kind}.gguf"
    assert tool.main([str(model_directory(tmp_path)), str(path), f"--type={kind}"]) == 0
    loaded, long, short = ask(path, {"prompt": list(range(40)), "steps": 0}, {"prompt": [5, 6, 7], "steps": 4})
    assert loaded == {"bytes": tool.total_bytes(config_of(SMALL), kind), "vocab": config_of(SMALL).vocab_size}
    assert long["prompt_s"] > 0 and short["decode_s"] > 0


def model_directory(path: Path) -> Path:
    (path / "config.json").write_text(json.dumps(tiny_config(SMALL, experts="int4", nested=True)))
    return path


@needs_llama
def test_failures_of_llama_cpp_are_answers(tool: ModuleType, tmp_path: Path) -> None:
    assert "does not load" in ask(tmp_path / "absent.gguf")[0]["error"]
    path = tmp_path / "small.gguf"
    tool.write_gguf(path, config_of(SMALL), "q4_0")
    assert "llama_decode returned" in ask(path, {"prompt": [1] * 300, "steps": 0})[1]["error"], (
        "longer than its context"
    )


@needs_llama
def test_the_tool_names_a_wrong_type(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    assert tool.main([str(model_directory(tmp_path)), str(out), "--type=q9_Z"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not out.exists()
