"""Experts of every kind of source in every format, with and without a calibration."""

from pathlib import Path

import numpy as np
import pytest
import torch

import quant
from hybrid.checkpoint import calibration, open_checkpoint, open_pack
from hybrid.checkpoint.manifest import read_manifest
from hybrid.checkpoint.pack_check import read_pack, scan_pack
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import INT4, Settings, quantize
from hybrid.convert.encode import full, hessian
from hybrid.errors import CheckpointError
from tests.checkpoint.packs import contents


@pytest.mark.parametrize("experts", ["bf16", "fp8"])
def test_other_sources(tmp_path: Path, experts: str) -> None:
    config = {"num_nextn_predict_layers": 0, "q_lora_rank": None}
    model = make_tiny(tmp_path / "m", experts=experts, prefix="model.", config=config)
    pack = quantize(model, tmp_path / "pack", Settings(mix=INT4))
    found = read_pack(scan_pack(pack))
    assert found.findings == [] and found.is_verified
    with open_pack(pack) as opened, open_checkpoint(model) as checkpoint:
        exact = checkpoint.expert(2, 5).down
        assert (opened.expert(2, 5).down.float() - exact.float()).norm() < 0.15 * exact.float().norm()
        for name in ("layers.0.self_attn.o_proj", "layers.1.self_attn.kv_b_proj"):
            assert (opened.linear(name) == checkpoint.linear(name)).all()
        assert 0 < opened.manifest.layers[2].errors[5, 1] < 0.02


def test_int4_is_kept_without_loss(tmp_path: Path, source: Path) -> None:
    pack = quantize(source, tmp_path / "pack", Settings(mix=INT4))
    with open_pack(pack) as opened, open_checkpoint(source) as checkpoint:
        for i in range(8):
            for ours, theirs in zip(opened.expert(1, i, torch.float32), checkpoint.expert(1, i), strict=True):
                np.testing.assert_array_equal(ours.numpy(), full(theirs))
        assert not opened.manifest.layers[1].errors.any()


def calibrate(model: Path, directory: Path, whole: bool) -> Path:
    """A calibration whose inputs have a few strong directions, and whose first expert was never chosen."""
    rng = np.random.default_rng(0)

    def moments(count: int, n: int) -> np.ndarray:
        x = rng.standard_normal((count, 2 * n, n)) * np.geomspace(1, 0.03, n)
        return np.einsum("eti,etj->eij", x, x).astype(np.float32) / (2 * n)

    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
        experts, inner = config.n_routed_experts, config.moe_intermediate_size
        manifest = calibration.Manifest(
            "m",
            calibration.fingerprint(checkpoint),
            100,
            50,
            [],
            list(config.moe_layers),
            "full" if whole else "diagonal",
        )
    writer = calibration.CalibrationWriter(directory, manifest)
    for layer in config.moe_layers:
        counts = np.arange(experts, dtype=np.int64) * 100
        second = moments(experts, inner)
        statistics = calibration.LayerStatistics(
            counts,
            counts.astype(np.float32),
            moments(1, config.hidden_size)[0],
            np.einsum("eii->ei", second).copy(),
            second if whole else None,
            2.0,
            np.linspace(0, 1, experts, dtype=np.float32),
        )
        writer.write_layer(layer, statistics)
    return writer.finish()


@pytest.mark.parametrize("whole", [True, False])
def test_a_calibration_lowers_the_error_it_measures(tmp_path: Path, source: Path, whole: bool) -> None:
    directory = calibrate(source, tmp_path / "calibration", whole)
    blind, guided = (
        read_manifest(quantize(source, tmp_path / name, Settings(bits=2.6, calibration=used)))
        for name, used in (("blind", None), ("guided", directory))
    )
    for layer in guided.layers.values():
        assert (layer.errors[1:, 0] < 0.8 * layer.plain_errors[1:, 0]).all()
    again = quantize(source, tmp_path / "again", Settings(bits=2.6, calibration=directory), threads=1)
    assert contents(again) == contents(tmp_path / "guided")
    steps = [sum(map(quant.LADDER.index, pair)) for layer in guided.layers.values() for pair in layer.formats]
    experts = len(guided.layers[1].formats)
    assert sum(steps[experts - 1 :: experts]) > sum(steps[::experts])  # busy and loud against never chosen
    assert guided.expert_bytes <= blind.expert_bytes * 1.05
    with pytest.raises(CheckpointError, match="another model"):
        quantize(make_tiny(tmp_path / "other", seed=5), tmp_path / "x", Settings(bits=3, calibration=directory))


def test_second_moments_of_few_tokens_are_shrunk(tmp_path: Path, source: Path) -> None:
    statistics = calibration.open_calibration(calibrate(source, tmp_path / "c", True)).layer(1)
    assert hessian(None, "down", 3) is None and hessian(statistics, "down", 0) is None
    assert hessian(statistics, "gate_up", 0) is statistics.hessian_x
    found, raw, n = hessian(statistics, "down", 3), statistics.hessian_h[3], 128
    trust = 300 / (300 + n)
    np.testing.assert_allclose(found, trust * raw + (1 - trust) * np.trace(raw) / n * np.eye(n), rtol=1e-4, atol=1e-7)
    diagonal = hessian(statistics._replace(hessian_h=None), "down", 3)
    np.testing.assert_allclose(diagonal, np.diag(np.diag(found)), rtol=1e-5)
