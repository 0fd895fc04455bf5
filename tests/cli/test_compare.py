"""`kimi-local compare`: figures against a direct computation, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli.compare import compare
from cli.options import KV, Activations
from cli.streaming import cut
from hybrid import Kimi
from hybrid.checkpoint.tiny import make_tiny
from hybrid.errors import UsageError
from hybrid.model import streamed
from tests.checkpoint import damage

TEXT = "The first of many words is that it was not the last; in this, as with his others, he had been one. " * 12
LENGTH = 48


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A copy of `tiny` with a router and an attention matrix a little different."""
    model = damage.copy(tiny, tmp_path_factory.mktemp("models") / "changed")
    shard = model / damage.SHARD
    for name in ("layers.1.mlp.gate.weight", "layers.0.self_attn.o_proj.weight"):
        stored = f"language_model.model.{name}"
        start, end = damage.header_of(shard)[stored]["data_offsets"]
        at = damage.tensor_offset(shard, stored)
        bits = torch.frombuffer(bytearray(shard.read_bytes()[at : at + end - start]), dtype=torch.bfloat16)
        noise = torch.randn(bits.shape, generator=torch.Generator().manual_seed(0))
        changed = (bits.float() * (1 + 0.3 * noise)).to(torch.bfloat16)
        damage.overwrite(shard, at, changed.view(torch.uint8).numpy().tobytes())
    return model


def report(capsys: pytest.CaptureFixture[str], a: Path, b: Path, text: Path, **options: Any) -> dict[str, Any]:
    options = {"ctx": LENGTH, "threads": 1} | options
    compare(str(a), str(b), [text], json_output=True, **options)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.mark.parametrize("activations", Activations)
def test_a_model_is_itself(
    capsys: pytest.CaptureFixture[str], tiny: Path, text: Path, activations: Activations
) -> None:
    found = report(capsys, tiny, tiny, text, activations=activations)
    assert found["kl_mean"] == found["kl_max"] == found["kl_stderr"] == 0
    assert found["top1"] == found["router_overlap"] == 1 and found["ppl_a"] == found["ppl_b"]
    assert [layer["router_overlap"] for layer in found["layers"]] == [None, 1, 1]
    assert all(layer["hidden_error"] == 0 for layer in found["layers"])


def logits(model: Path, windows: list[list[int]]) -> torch.Tensor:
    with Kimi.load(model, ctx=512, threads=1, activations="float32", dtype="float32") as kimi:
        return torch.stack([kimi.logits(window) for window in windows]).double()


def test_figures_are_those_of_a_direct_computation(
    capsys: pytest.CaptureFixture[str], tiny: Path, changed: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "LOGITS_AT_ONCE", 7 * 576)  # seven rows
    found = report(capsys, tiny, changed, text, activations=Activations.float32, tokens=5 * LENGTH + 3)
    with Kimi.load(tiny, ctx=512, threads=1) as kimi:
        windows = cut([kimi.tokenizer.encode(TEXT)], LENGTH, 5 * LENGTH)
    a, b = (logits(model, windows).log_softmax(-1) for model in (tiny, changed))
    kl = (a.exp() * (a - b)).sum(-1)
    following = torch.tensor(windows)[:, 1:, None]
    assert found["tokens"] == 5 * LENGTH and kl.mean() > 1e-3
    expected = {
        "kl_mean": kl.mean(),
        "kl_median": np.median(kl),
        "kl_p99": np.quantile(kl, 0.99),
        "kl_max": kl.max(),
        "kl_stderr": kl.mean(1).std() / 5**0.5,
        "top1": (a.argmax(-1) == b.argmax(-1)).double().mean(),
        "ppl_a": (-a[:, :-1].gather(-1, following)).mean().exp(),
        "ppl_b": (-b[:, :-1].gather(-1, following)).mean().exp(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4), name
    assert 0.3 < found["router_overlap"] < 1
    assert found["layers"][0]["hidden_error"] > 0 and found["layers"][0]["router_overlap"] is None


def test_figures_for_people(capsys: pytest.CaptureFixture[str], tiny: Path, changed: Path, text: Path) -> None:
    compare(str(tiny), str(changed), [text], ctx=LENGTH, tokens=2 * LENGTH, threads=1)
    out = capsys.readouterr().out
    assert "KL(A || B), A tiny, B changed" in out and "experts chosen in common" in out
    assert not any(line.endswith(" ") for line in out.splitlines())


def test_what_a_reduced_cache_costs(capsys: pytest.CaptureFixture[str], tiny: Path, text: Path) -> None:
    found = [
        report(capsys, tiny, tiny, text, kv=kv, activations=Activations.float32) for kv in (KV.bf16, KV.int8, KV.fp8)
    ]
    divergences = [each["kl_mean"] for each in found]
    assert 0 < divergences[0] < divergences[1] < divergences[2] < 0.1
    compare(str(tiny), str(tiny), [text], ctx=LENGTH, tokens=LENGTH, kv=KV.fp8, threads=1)
    assert "B tiny with a KV cache in fp8" in capsys.readouterr().out


def test_models_of_other_depth_are_compared_by_their_answers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, text: Path
) -> None:
    deeper = make_tiny(tmp_path / "deeper", config={"num_hidden_layers": 4})
    found = report(capsys, tiny, deeper, text, tokens=LENGTH)
    assert found["layers"] == [] and found["router_overlap"] is None and found["kl_mean"] > 0
    assert found["kl_stderr"] is None  # one window


def test_models_of_other_vocabularies_are_refused(tmp_path: Path, tiny: Path, text: Path) -> None:
    other = make_tiny(tmp_path / "other", config={"vocab_size": 300 + 256})
    with pytest.raises(UsageError, match="tiny and other have different vocabularies"):
        compare(str(tiny), str(other), [text])


def test_texts_that_cannot_be_used_are_refused(tmp_path: Path, tiny: Path, text: Path) -> None:
    with pytest.raises(UsageError, match=r"No text has 4,000 tokens; the longest has \d"):
        compare(str(tiny), str(tiny), [text], ctx=4000)
    with pytest.raises(UsageError, match="--ctx 5,000 is too long for tiny"):
        compare(str(tiny), str(tiny), [text], ctx=5000)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not UTF-8"):
        compare(str(tiny), str(tiny), [binary])


def test_windows_are_taken_from_the_texts_in_turn() -> None:
    ids = [list(range(0, 7)), list(range(10, 12)), list(range(20, 29))]
    assert cut(ids, 2, None) == [[0, 1], [10, 11], [20, 21], [2, 3], [22, 23], [4, 5], [24, 25], [26, 27]]
    assert cut(ids, 2, 5) == [[0, 1], [10, 11]]
    assert cut(ids, 512, 3) == [[0, 1, 2]]  # fewer tokens than a window: one short window


def test_errors_are_one_line(text: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "compare", "nowhere", "nowhere", "--text", str(text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and done.stderr.count("\n") == 1 and "no model directory nowhere" in done.stderr
