"""`kimi-local calibrate`: statistics against a slow computation, and the same bytes after any interruption."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cli.calibrate import calibrate
from cli.streaming import cut
from hybrid.chat.tokenizer import Tokenizer
from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.checkpoint.calibration import Calibration, open_calibration
from hybrid.checkpoint.hf import Int4Weight
from hybrid.checkpoint.tiny import make_tiny
from hybrid.errors import CheckpointError, DoesNotFit, Retry, UsageError
from hybrid.model.streamed import Observer, Stream, on_cpu

LENGTH = 40
TEXTS = (
    "It was the first of many, and he had been with them as one. " * 9,
    "On that, or this: is it not in you? " * 12,
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("text")
    paths = [directory / "first.txt", directory / "second.txt"]
    for path, content in zip(paths, TEXTS, strict=True):
        path.write_text(content)
    return paths


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny: Path, texts: list[Path]) -> Path:
    """A calibration made without interruption."""
    directory = tmp_path_factory.mktemp("calibrations") / "whole"
    calibrate(str(tiny), texts, directory, ctx=LENGTH, threads=1)
    return directory


def windows(model: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_directory(model)
    return cut([tokenizer.encode(text) for text in TEXTS], LENGTH, None)


def decoded(weight: object) -> np.ndarray:
    """float64 [out, in] of an INT4 matrix."""
    assert isinstance(weight, Int4Weight)
    codes = np.stack([weight.packed & 15, weight.packed >> 4], axis=2).reshape(len(weight.packed), -1) - 8.0
    return codes * np.repeat((weight.scales.astype(np.uint32) << 16).view(np.float32), 32, axis=1)


def test_statistics_are_those_of_a_slow_computation(tiny: Path, done: Path) -> None:
    calibration = open_calibration(done)
    with open_checkpoint(tiny) as checkpoint:
        calibration.require_match(checkpoint)
        stream = Stream(checkpoint, on_cpu("float32", 1), windows(tiny))
        stream.step()
        for layer in (1, 2):
            entered = stream.h.double().numpy().copy()
            compare_layer(calibration, checkpoint, layer, entered, *routing_of(stream))


def routing_of(stream: Stream) -> list[np.ndarray]:
    """x, topk_ids and topk_weights of the layer that the stream passes next, float64."""
    told: list[np.ndarray] = []
    stream.step(Observer(routing=lambda *each: told.extend(tensor.double().numpy() for tensor in each)))
    return told


def compare_layer(
    calibration: Calibration,
    checkpoint: Checkpoint,
    layer: int,
    entered: np.ndarray,
    x: np.ndarray,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
) -> None:
    """One token after the other, one expert after the other."""
    found = calibration.layer(layer)
    assert found.hessian_h is not None
    close = {"rtol": 1e-4, "atol": 1e-6}
    np.testing.assert_allclose(found.hessian_x, sum(np.outer(row, row) for row in x) / len(x), **close)
    np.testing.assert_allclose(found.residual_ms, np.mean([row @ row for row in entered]), **close)
    for expert in range(checkpoint.config.n_routed_experts):
        gate, up, down = (decoded(weight) for weight in checkpoint.expert(layer, expert))
        inner, outputs, mass = [], [], 0.0
        for token, slot in zip(*np.nonzero(topk_ids == expert), strict=True):
            weight, gated = topk_weights[token, slot], gate @ x[token]
            inner.append(weight * gated / (1 + np.exp(-gated)) * (up @ x[token]))
            outputs.append(down @ inner[-1])
            mass += weight
        assert found.counts[expert] == len(inner) > 0
        np.testing.assert_allclose(found.mass[expert], mass, **close)
        np.testing.assert_allclose(found.importance_h[expert], np.mean(np.square(inner), axis=0), **close)
        np.testing.assert_allclose(found.hessian_h[expert], np.mean([np.outer(h, h) for h in inner], axis=0), **close)
        np.testing.assert_allclose(found.output_ms[expert], np.mean([out @ out for out in outputs]), **close)


def test_the_manifest_says_of_what_it_was_made(tiny: Path, done: Path, texts: list[Path]) -> None:
    manifest = open_calibration(done).manifest
    assert (manifest.model, manifest.sequence, manifest.layers) == ("tiny", LENGTH, [1, 2])
    assert manifest.tokens == LENGTH * len(windows(tiny)) and manifest.hessian_h == "full"
    digest = hashlib.sha256(texts[1].read_bytes()).hexdigest()
    assert manifest.texts[1] == {"name": "second.txt", "sha256": digest}


KILLED = """
import os, signal, sys
from cli.main import main
before = int(sys.argv.pop(1))
calls, real = [], {}
def dying(name):
    def call(*arguments):
        calls.append(name)
        if len(calls) == before:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*arguments)
    return call
for name in ("replace", "rename"):
    real[name] = getattr(os, name)
main_arguments = sys.argv[1:]
import hybrid.checkpoint.calibration
for name in real:
    setattr(hybrid.checkpoint.calibration.os, name, dying(name))
main(main_arguments)
"""
# Files take their names in this order: unfinished.json, residual-001, layer-001, residual-002, layer-002, then
# calibration.json. A process killed before the n-th leaves a partial file and everything before it.


@pytest.mark.parametrize("before, left", [(3, 1), (4, 1), (6, 2)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, tiny: Path, done: Path, texts: list[Path], before: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "c"
    named = [argument for path in texts for argument in ("--text", str(path))]
    options = ["--ctx", str(LENGTH), "--threads", "1", "-o", str(directory)]
    command = [sys.executable, "-c", KILLED, str(before), "calibrate", str(tiny), *named, *options]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(CheckpointError, match="unfinished"):
        open_calibration(directory)
    steps: list[int] = []
    step = Stream.step
    monkeypatch.setattr(Stream, "step", lambda self, *told: (steps.append(self.done), step(self, *told)))
    calibrate(str(tiny), texts, directory, ctx=LENGTH, threads=1)
    assert steps == list(range(left, 3))
    whole, resumed = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (done, directory))
    assert resumed == whole


def test_a_finished_calibration_is_not_made_again(
    capsys: pytest.CaptureFixture[str], tiny: Path, done: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Stream, "step")
    calibrate(str(tiny), texts, done, ctx=LENGTH, threads=1)
    assert capsys.readouterr().out == f"{done}\n"
    with pytest.raises(UsageError, match="another model or text"):
        calibrate(str(tiny), texts[:1], done, ctx=LENGTH, threads=1)


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, tiny: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Stream, *told: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "step", interrupt)
    with pytest.raises(Retry, match="keeps the layers that are done. The same command continues."):
        calibrate(str(tiny), texts, tmp_path / "c", ctx=LENGTH, threads=1)


FULL = """
import os, subprocess, sys
import hybrid.model.calibrate
from cli.main import main
place, size, *command = sys.argv[1:]
mount = ("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
if subprocess.run(mount, capture_output=True).returncode:
    sys.exit("no mount")
hybrid.model.calibrate.disk_free = lambda path: 1 << 40  # which another program takes before we do
def run():
    try:
        main(command)
    except SystemExit as ended:
        print(ended.code, sorted(os.listdir(f"{place}/c")), flush=True)
run()
subprocess.run(("mount", "-o", "remount,size=64m", place), check=True)
run()
os.execvp("sha256sum", ["sha256sum", *(f"{place}/c/{name}" for name in sorted(os.listdir(f"{place}/c")))])
"""


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on(
    tmp_path: Path, tiny: Path, done: Path, texts: list[Path]
) -> None:
    """A real one, in a namespace of mounts of its own, with room for a layer and one and a half residual streams."""
    place = tmp_path / "disk"
    place.mkdir()
    with open_checkpoint(tiny) as checkpoint:
        residual = 4 * LENGTH * len(windows(tiny)) * checkpoint.config.hidden_size
    size = (done / "layer-001.safetensors").stat().st_size + residual * 3 // 2 + 12288
    named = [argument for path in texts for argument in ("--text", str(path))]
    options = ["calibrate", str(tiny), *named, "--ctx", str(LENGTH), "--threads", "1", "-o", str(place / "c")]
    apart = ["unshare", "-r", "-m", sys.executable, "-c", FULL, str(place), str(size), *options]
    try:
        ran = subprocess.run(apart, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if "no mount" in ran.stderr or "unshare: " in ran.stderr:
        pytest.skip("mounts are not allowed here")
    assert ran.returncode == 0, ran.stderr
    full, _, _, *sums = ran.stdout.splitlines()
    assert full == "3 ['layer-001.safetensors', 'residual-001.safetensors', 'unfinished.json']", ran.stdout
    told = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert told == [
        f"error: The disk of {place / 'c'} is full. Nothing is lost. Free space and run the same command again; it "
        "continues where it stopped."
    ]
    assert "Traceback" not in ran.stderr
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(done.iterdir())]
    assert [line.split()[0] for line in sums] == expected


def test_a_file_system_for_small_files_is_one_line(tmp_path: Path, tiny: Path, done: Path, texts: list[Path]) -> None:
    limit = (done / "layer-001.safetensors").stat().st_size // 2
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from cli.main import main; main(sys.argv[1:])"
    )
    named = [argument for path in texts for argument in ("--text", str(path))]
    options = ["calibrate", str(tiny), *named, "--ctx", str(LENGTH), "--threads", "1", "-o", str(tmp_path / "c")]
    ran = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=120)
    told = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert ran.returncode == 3 and len(told) == 1 and "does not take files of this size" in told[0], ran.stderr
    assert "Traceback" not in ran.stderr and not list((tmp_path / "c").glob(".*")), "no partial file stays"


def test_what_cannot_be_calibrated_is_refused(
    tmp_path: Path, tiny: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_tiny(tmp_path / "dense", config={"first_k_dense_replace": 3})
    with pytest.raises(UsageError, match="has no routed experts"):
        calibrate(str(dense), texts, tmp_path / "c", ctx=LENGTH)
    monkeypatch.setattr("hybrid.model.calibrate.disk_free", lambda path: 1000)
    with pytest.raises(DoesNotFit, match="GB of disk"):
        calibrate(str(tiny), texts, tmp_path / "c", ctx=LENGTH)
    assert not (tmp_path / "c").exists()
