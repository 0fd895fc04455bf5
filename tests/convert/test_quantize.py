"""Quantizing: the same bytes however often it was interrupted, and one clear line for whatever is in the way."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid.checkpoint.manifest import UNFINISHED, read_manifest
from hybrid.checkpoint.pack_check import read_pack, scan_pack
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import PartDone, Reports, Settings, encode, quantize, summarise
from hybrid.convert.journal import Entry, Journal, read_journal
from hybrid.errors import CheckpointError, DoesNotFit, KimiError, UsageError
from hybrid.progress import Progress
from tests.checkpoint.packs import contents, resharded

KILLED = Path(__file__).with_name("killed.py")
MIX = Settings(bits=2.6, resident="int8")  # as killed.py


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, bytes]:
    """The files of a pack that was made without interruption."""
    return contents(quantize(source, tmp_path_factory.mktemp("packs") / "pack", MIX, threads=1))


@pytest.mark.parametrize(("seed", "options"), [(1, []), (2, []), (3, ["--delete-source"])])
def test_killed_again_and_again_it_makes_the_same_bytes(
    tmp_path: Path, source: Path, whole: dict[str, bytes], seed: int, options: list[str]
) -> None:
    copy, target = Path(shutil.copytree(source, tmp_path / "source")), tmp_path / "pack"
    command = [sys.executable, str(KILLED), str(copy), str(target), str(seed), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
    assert contents(target) == whole
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("pack")] == ["pack"]
    assert bool(list(copy.glob("*.safetensors"))) is not bool(options)


def test_threads_and_progress(tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    seen: list[Progress] = []
    parts: list[PartDone] = []
    written: list[int] = []
    reports = Reports(seen.append, parts.append, lambda weights, count: written.append(count))
    assert contents(quantize(source, tmp_path / "pack", MIX, threads=3, reports=reports)) == whole
    total = read_manifest(tmp_path / "pack").routed_weights
    assert seen[0].done == 0 and (seen[-1].done, seen[-1].total) == (total, total)
    assert [part.part for part in parts] == ["tables", "00000", "00001", "00002"]
    assert parts[0].mean_error is None and 0.02 < (parts[-1].mean_error or 0) < 0.2
    assert sum(written) == sum(len(data) for name, data in whole.items() if name.startswith("experts"))


# -- taking up again --------------------------------------------------------------------------------------------------
def interrupt(monkeypatch: pytest.MonkeyPatch, source: Path, target: Path, error: BaseException, after: int) -> None:
    """A run that fails with `error` when it writes its expert number `after`."""
    write, calls = os.pwrite, []

    def failing(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) == after:
            raise error
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        quantize(source, target, MIX, threads=1)


def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, whole: dict[str, bytes]
) -> None:
    target = tmp_path / "pack"
    with pytest.raises(DoesNotFit, match="is full. Nothing is lost") as caught:
        interrupt(monkeypatch, source, target, OSError(errno.ENOSPC, "No space left on device"), 12)
    assert "run the same command again" in caught.value.remedy
    encoded = count_encoded(monkeypatch)
    assert contents(quantize(source, target, MIX)) == whole
    assert len(encoded) == 2 * (16 - 11)


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Formats of the matrices that are encoded from now on."""
    whole, seen = encode.encode, []

    def counting(weights: np.ndarray, format: str, *more: Any) -> Any:
        seen.append(format)
        return whole(weights, format, *more)

    monkeypatch.setattr(encode, "encode", counting)
    return seen


def test_a_file_system_without_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    with pytest.raises(DoesNotFit, match="does not take files of this size"):
        interrupt(monkeypatch, source, tmp_path / "pack", OSError(errno.EFBIG, "File too large"), 1)


def test_an_interrupt_keeps_what_was_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, whole: dict[str, bytes]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt(monkeypatch, source, tmp_path / "pack", KeyboardInterrupt(), 10)
    assert len(count_encoded(monkeypatch)) == 0
    assert contents(quantize(source, tmp_path / "pack", MIX)) == whole


def test_damage_to_an_unfinished_pack_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, whole: dict[str, bytes]
) -> None:
    target = tmp_path / "pack"
    with pytest.raises(DoesNotFit):
        interrupt(monkeypatch, source, target, OSError(errno.ENOSPC, ""), 6)
    staging = tmp_path / "pack.partial"
    partial = staging / "experts-00001.bin.partial"
    data = bytearray(partial.read_bytes())
    data[3] ^= 1
    partial.write_bytes(data)
    with (staging / "experts-00001.jsonl").open("ab") as file:
        file.write(b"[7,12345,[0.1,0.1],[0.1,0.1]] 00000000\n[6,1,[0.")
    encoded = count_encoded(monkeypatch)
    assert contents(quantize(source, target, MIX)) == whole
    assert len(encoded) == 2 * (16 - 5 + 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(bits=2.5, resident="int8"), "begun with bits 2.6, not 2.5"),
        (Settings(mix=("trellis1", "trellis2"), resident="int8"), "begun with bits 2.6, not none"),
        (Settings(bits=2.6), "begun with resident int8, not bf16"),
        (Settings(bits=2.6, resident="int8", seed=1), "begun with seed 0, not 1"),
    ],
)
def test_other_arguments_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, settings: Settings, words: str
) -> None:
    with pytest.raises(DoesNotFit):
        interrupt(monkeypatch, source, tmp_path / "pack", OSError(errno.ENOSPC, ""), 2)
    with pytest.raises(UsageError, match=words) as caught:
        quantize(source, tmp_path / "pack", settings)
    assert "pack.partial to begin anew" in caught.value.remedy


def test_another_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    with pytest.raises(DoesNotFit):
        interrupt(monkeypatch, copy, tmp_path / "pack", OSError(errno.ENOSPC, ""), 2)
    other = make_tiny(tmp_path / "other")
    with pytest.raises(UsageError, match="begun with model"):
        quantize(other, tmp_path / "pack", MIX)
    shard = sorted(copy.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(UsageError, match=f"{shard.name} has changed"):
        quantize(copy, tmp_path / "pack", MIX)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}, which part"):
        quantize(copy, tmp_path / "pack", MIX)


def test_the_journal_ignores_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "experts.jsonl"
    entries = [Entry(i, i * i, (0.1, 0.2), (0.3, 0.4)) for i in range(3)]
    journal = Journal(path, {})
    for entry in entries:
        journal.add(entry)
    journal.close()
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        kept = list(read_journal(path).values())
        assert kept == entries[: data[:cut].count(b"\n")]
    assert read_journal(tmp_path / "absent") == {}


# -- disk -------------------------------------------------------------------------------------------------------------
def test_a_small_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    free = shutil._ntuple_diskusage(10**9, 10**9, 10**6)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(DoesNotFit, match="GB more, its disk has 0.00 GB free"):
        quantize(source, tmp_path / "pack", MIX)
    assert list(tmp_path.iterdir()) == []


def test_linked_shards_are_never_deleted(tmp_path: Path, source: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link"):
        quantize(copy, tmp_path / "pack", MIX, delete_source=True)
    assert shard.exists()


def test_a_single_file_can_be_deleted_too(tmp_path: Path, source: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    single = resharded(copy, tmp_path / "single", 2**30)
    next(single.glob("*.safetensors")).rename(single / "model.safetensors")
    (single / "model.safetensors.index.json").unlink()
    pack = quantize(single, tmp_path / "pack", MIX, delete_source=True)
    assert not list(single.glob("*.safetensors"))
    assert read_pack(scan_pack(pack)).is_verified


def test_a_finished_pack_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    pack = quantize(copy, tmp_path / "pack", MIX)
    encoded = count_encoded(monkeypatch)
    assert quantize(copy, pack, MIX) == pack and list(copy.glob("*.safetensors"))
    assert quantize(copy, pack, MIX, delete_source=True) == pack and not list(copy.glob("*.safetensors"))
    assert not encoded


# -- what is in the way -----------------------------------------------------------------------------------------------
def damaged_shard(model: Path) -> None:
    from tests.checkpoint.test_deep import record_download

    record_download(sorted(model.glob("*.safetensors"))[1], "0" * 64)


def not_numbers(model: Path) -> None:
    from tests.checkpoint import damage

    name = "language_model.model.layers.2.mlp.experts.3.up_proj.weight_scale"
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = model / index["weight_map"][name]
    damage.overwrite(shard, damage.tensor_offset(shard, name), b"\xff\x7f")


@pytest.mark.parametrize(
    ("apply", "words"),
    [(damaged_shard, "its sha256 is not that of its download"), (not_numbers, "layer 2 expert 3 holds NaN")],
)
def test_a_damaged_source_is_named(tmp_path: Path, source: Path, apply: Callable[[Path], None], words: str) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    apply(copy)
    with pytest.raises(CheckpointError, match=words):
        quantize(copy, tmp_path / "pack", MIX)


def test_what_cannot_be_quantized(tmp_path: Path, source: Path) -> None:
    pack = quantize(source, tmp_path / "pack", MIX)
    with pytest.raises(UsageError, match="already exists"):
        quantize(source, pack, Settings(bits=2.6))
    with pytest.raises(UsageError, match="already exists"):
        quantize(source, source, MIX)
    with pytest.raises(UsageError, match="is a pack already"):
        quantize(pack, tmp_path / "other", MIX)
    dense = make_tiny(tmp_path / "dense", config={"n_routed_experts": 0, "first_k_dense_replace": 3})
    with pytest.raises(UsageError, match="no routed experts"):
        quantize(dense, tmp_path / "other", MIX)
    odd = make_tiny(tmp_path / "odd", experts="bf16", config={"moe_intermediate_size": 48})
    with pytest.raises(UsageError, match="not multiples of 32"):
        quantize(odd, tmp_path / "other", MIX)
    with pytest.raises(DoesNotFit, match="The experts need at least"):
        quantize(source, tmp_path / "other", Settings(bits=0.5))
    with pytest.raises(CheckpointError, match="is no pack"):
        summarise(source)
    assert not (tmp_path / "other.partial").exists()


def test_only_one_process_writes_a_pack(tmp_path: Path, source: Path) -> None:
    from hybrid.checkpoint.durable import alone

    (tmp_path / "pack.partial").mkdir()
    with alone(tmp_path / "pack.partial"), pytest.raises(KimiError, match="another process"):
        quantize(source, tmp_path / "pack", MIX)


def test_the_plan_file_goes_when_the_pack_is_done(whole: dict[str, bytes]) -> None:
    assert UNFINISHED not in whole and not [name for name in whole if name.startswith("part-")]
