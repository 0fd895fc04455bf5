"""Calibration directories: what is written is read back, and what does not belong together is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.calibration import (
    COMPLETE,
    CalibrationWriter,
    LayerStatistics,
    Manifest,
    file_bytes,
    fingerprint,
    keeps_full_hessians,
    layer_file,
    open_calibration,
    pack_symmetric,
    read_arrays,
    unpack_symmetric,
)
from hybrid.checkpoint.tiny import make_tiny
from hybrid.errors import CheckpointError, UsageError
from tests.checkpoint import damage

EXPERTS, HIDDEN, INNER = 3, 8, 4


def symmetric(rng: np.random.Generator, *shape: int) -> np.ndarray:
    half = rng.standard_normal((*shape, shape[-1]), dtype=np.float32)
    return half + half.swapaxes(-1, -2)


def statistics(seed: int, full: bool = True) -> LayerStatistics:
    rng = np.random.default_rng(seed)
    return LayerStatistics(
        rng.integers(0, 100, EXPERTS),
        rng.random(EXPERTS, np.float32),
        symmetric(rng, HIDDEN),
        rng.random((EXPERTS, INNER), np.float32),
        symmetric(rng, EXPERTS, INNER) if full else None,
        0.5 * seed,
        rng.random(EXPERTS, np.float32),
    )


def manifest(**changes: object) -> Manifest:
    texts = [{"name": "a.txt", "sha256": "0" * 64}]
    return replace(Manifest("tiny", "f" * 64, 1024, 128, texts, [1, 2], "full"), **changes)


def write(directory: Path, full: bool = True, **changes: object) -> Path:
    writer = CalibrationWriter(directory, manifest(hessian_h="full" if full else "diagonal", **changes))
    for layer in (1, 2):
        writer.write_layer(layer, statistics(layer, full))
        writer.write_residual(layer + 1, np.zeros((5, HIDDEN), np.float32))
    return writer.finish()


@pytest.mark.parametrize("full", [True, False])
def test_what_is_written_is_read_back(tmp_path: Path, full: bool) -> None:
    calibration = open_calibration(write(tmp_path / "c", full))
    assert calibration.layers == (1, 2) and calibration.manifest.tokens == 1024
    for layer in calibration.layers:
        for name, expected in statistics(layer, full)._asdict().items():
            found = getattr(calibration.layer(layer), name)
            assert (found is None) == (expected is None)
            if expected is not None:
                np.testing.assert_array_equal(found, expected)
    assert sorted(path.name for path in calibration.path.iterdir()) == [COMPLETE, layer_file(1), layer_file(2)]


@given(st.integers(1, 9), st.lists(st.integers(1, 3), max_size=2))
def test_triangles_hold_all_of_a_symmetric_matrix(n: int, stack: list[int]) -> None:
    full = symmetric(np.random.default_rng(n), *stack, n)
    packed = pack_symmetric(full)
    assert packed.shape == (*stack, n * (n + 1) // 2)
    np.testing.assert_array_equal(packed, full[..., *np.triu_indices(n)])
    np.testing.assert_array_equal(unpack_symmetric(packed), full)


def test_the_latest_residual_stream_is_kept_and_found(tmp_path: Path) -> None:
    writer = CalibrationWriter(tmp_path / "c", manifest())
    assert writer.read_residual() is None
    for done in (1, 2):
        writer.write_residual(done, np.full((2, HIDDEN), done, np.float32))
    found = CalibrationWriter(tmp_path / "c", manifest()).read_residual()
    assert found is not None and found[0] == 2 and (found[1] == 2).all()
    assert len(list((tmp_path / "c").glob("residual-*"))) == 1


def test_an_unfinished_or_absent_calibration_is_refused(tmp_path: Path) -> None:
    CalibrationWriter(tmp_path / "c", manifest())
    with pytest.raises(CheckpointError, match="unfinished. The same calibrate command continues it"):
        open_calibration(tmp_path / "c")
    with pytest.raises(CheckpointError, match="is no calibration"):
        open_calibration(tmp_path / "nowhere")


def test_a_directory_with_anything_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(UsageError, match="is not empty"):
        CalibrationWriter(tmp_path, manifest())
    done = write(tmp_path / "c")
    with pytest.raises(UsageError, match="another model or text"):
        CalibrationWriter(done, manifest(tokens=2048))
    assert CalibrationWriter(done, manifest()).is_complete


def test_it_belongs_to_one_model(tmp_path: Path, tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint, open_checkpoint(make_tiny(tmp_path / "o", seed=1)) as other:
        calibration = open_calibration(write(tmp_path / "c", fingerprint=fingerprint(checkpoint)))
        calibration.require_match(checkpoint)
        with pytest.raises(CheckpointError, match=r"made with another model \(tiny\) than .*/o\."):
            calibration.require_match(other)
    with open_checkpoint(damage.copy(tiny, tmp_path / "copy")) as copy:
        calibration.require_match(copy)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    done = write(tmp_path / "c")
    data = (done / layer_file(1)).read_bytes()
    (done / layer_file(1)).write_bytes(data[:-4])
    (done / layer_file(2)).unlink()
    for layer in (1, 2):
        with pytest.raises(CheckpointError, match=f"{layer_file(layer)}.* Run kimi-local calibrate again"):
            open_calibration(done).layer(layer)
    (done / layer_file(1)).write_bytes(data.replace(b'"mass"', b'"math"'))
    with pytest.raises(CheckpointError, match="it lacks mass"):
        open_calibration(done).layer(1)
    damage.rewrite_json(done / COMPLETE, lambda content: content.update(format_version=9))
    with pytest.raises(CheckpointError, match="format version 9, not 1"):
        open_calibration(done)
    damage.rewrite_json(done / COMPLETE, lambda content: content.update(format_version=1, more=1))
    with pytest.raises(CheckpointError, match="fields are not those of a calibration"):
        open_calibration(done)


def test_sizes_are_known_beforehand(tmp_path: Path, tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        config = checkpoint.config
    small = replace(config, n_routed_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=INNER)
    arrays = read_arrays(write(tmp_path / "c") / layer_file(1))
    assert file_bytes(small) + 4 == sum(array.nbytes for array in arrays.values())  # residual_ms
    released = replace(config, n_routed_experts=384, hidden_size=7168, moe_intermediate_size=2048, num_hidden_layers=61)
    assert keeps_full_hessians(small) and not keeps_full_hessians(released)
    assert 6.3e9 < 60 * file_bytes(released) < 6.5e9


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    content = json.loads((write(tmp_path / "c") / COMPLETE).read_text())
    assert content["texts"] == [{"name": "a.txt", "sha256": "0" * 64}] and content["format_version"] == 1
