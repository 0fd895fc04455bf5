"""Reading everything: flipped bytes against checksums, numbers no healthy model contains, honest conclusions."""

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest

from hybrid.checkpoint.check import Finding
from hybrid.checkpoint.deep import DeepReport, check_deep, download_sha256, write_checksums
from hybrid.checkpoint.tiny import make_tiny
from hybrid.checkpoint.write import CHECKSUMS
from hybrid.errors import CheckpointError
from hybrid.progress import Progress
from tests.checkpoint import damage
from tests.checkpoint.damage import SHARD

LAYER = "language_model.model.layers.1"
PACKED = f"{LAYER}.mlp.experts.2.up_proj.weight_packed"
SCALE = f"{LAYER}.mlp.experts.2.up_proj.weight_scale"
SHAPE = f"{LAYER}.mlp.experts.2.up_proj.weight_shape"
BIAS = f"{LAYER}.mlp.gate.e_score_correction_bias"
NORM = f"{LAYER}.input_layernorm.weight"


@pytest.fixture
def model(tmp_path: Path, tiny: Path) -> Path:
    return damage.copy(tiny, tmp_path / "model")


def of(report: DeepReport, severity: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.severity == severity]


def forget_checksums(model: Path) -> None:
    (model / CHECKSUMS).unlink()


def poke(model: Path, name: str, data: bytes, index: int = 0) -> None:
    damage.overwrite(model / SHARD, damage.tensor_offset(model / SHARD, name) + index, data)


def test_a_healthy_model_is_fully_verified(model: Path) -> None:
    seen: list[Progress] = []
    report = check_deep(model, seen.append)
    assert report.findings == [] and report.is_verified
    assert report.conclusion() == "All 187 tensors were compared with checksums.json."
    assert seen[-1].done == seen[-1].total == report.num_bytes
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert report.scales == 2 * 8 * 3 * 128 * 64 // 32
    assert (report.statistics["zero"], report.statistics["negative"]) == (0, 0)


@pytest.mark.parametrize("name", [PACKED, SCALE, SHAPE, BIAS, NORM, "language_model.lm_head.weight"])
@pytest.mark.parametrize("mask", [1, 0x80])
def test_a_flipped_bit_names_its_tensor(model: Path, name: str, mask: int) -> None:
    damage.flip_byte(model / SHARD, name, mask=mask)
    found = of(check_deep(model), "error")
    assert {finding.where for finding in found} == {name}
    assert "damaged: checksum" in found[0].message and SHARD in found[0].message


def test_without_checksums_the_report_admits_what_it_cannot_see(model: Path) -> None:
    forget_checksums(model)
    damage.flip_byte(model / SHARD, PACKED)
    report = check_deep(model)
    assert report.findings == [] and not report.is_verified
    assert report.conclusion().startswith("No checksums are known")
    assert "cannot be seen" in report.conclusion()


def test_recorded_checksums_find_later_damage(model: Path) -> None:
    recorded = json.loads((model / CHECKSUMS).read_text())
    forget_checksums(model)
    assert write_checksums(model, check_deep(model)) == model / CHECKSUMS
    assert json.loads((model / CHECKSUMS).read_text()) == recorded  # the same as the writer's own
    damage.flip_byte(model / SHARD, PACKED)
    report = check_deep(model)
    assert [finding.where for finding in of(report, "error")] == [PACKED]
    with pytest.raises(CheckpointError, match="has errors"):
        write_checksums(model, report)
    assert json.loads((model / CHECKSUMS).read_text()) == recorded


def test_partial_checksums_are_counted(model: Path) -> None:
    damage.rewrite_json(model / CHECKSUMS, lambda content: content["tensors"].pop(PACKED) and None)
    report = check_deep(model)
    assert not report.is_verified and report.conclusion().startswith("Compared: 186 of 187 tensors")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (NORM, b"\xc0\x7f", "1 values are NaN or infinite"),
        (SCALE, b"\x80\xff", "1 values are NaN or infinite"),
        (BIAS, struct.pack("<f", float("nan")), "1 values are NaN or infinite"),
        (BIAS, struct.pack("<2f", float("inf"), float("-inf")), "2 values are NaN or infinite"),
        (SHAPE, struct.pack("<2i", 64, 999), "says [64, 999], the packed weight holds another shape"),
    ],
)
def test_impossible_numbers_are_errors(model: Path, name: str, data: bytes, message: str) -> None:
    forget_checksums(model)
    poke(model, name, data)
    found = of(check_deep(model), "error")
    assert [finding.where for finding in found] == [name] and message in found[0].message


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (NORM, struct.pack("<f", 3e9)[2:], "1 values are larger than a million"),
        (SCALE, struct.pack("<f", -0.5)[2:], "1 scales are negative"),
    ],
)
def test_suspicious_numbers_are_warnings(model: Path, name: str, data: bytes, message: str) -> None:
    forget_checksums(model)
    poke(model, name, data)
    report = check_deep(model)
    assert [(f.severity, f.where) for f in report.findings] == [("warning", name)]
    assert message in report.findings[0].message


def test_statistics_count_zero_and_subnormal_scales_and_lowest_codes(model: Path) -> None:
    forget_checksums(model)
    poke(model, SCALE, b"\x00\x00\x01\x00\x00\x80")  # 0, subnormal, -0
    before = check_deep(model).statistics["lowest_codes"]
    poke(model, PACKED, b"\x11\x11")
    none = check_deep(model).statistics["lowest_codes"]
    poke(model, PACKED, b"\x00\x10")  # codes -8 -8, -8 -7
    after = check_deep(model).statistics
    assert after["lowest_codes"] == none + 3 and before >= none
    assert (after["zero"], after["subnormal"], after["negative"]) == (2, 1, 0)


def test_nan_in_fp8(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "m", experts="fp8", prefix="model.")
    forget_checksums(model)
    name = "model.layers.0.self_attn.o_proj.weight"
    poke(model, name, b"\x7f\xff\x7e")
    found = of(check_deep(model), "error")
    assert [finding.where for finding in found] == [name] and "2 values are NaN" in found[0].message


def record_download(file: Path, digest: str) -> None:
    metadata = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")


def test_a_downloads_sha256_verifies_the_whole_file(model: Path) -> None:
    forget_checksums(model)
    shard = model / SHARD
    record_download(shard, hashlib.sha256(shard.read_bytes()).hexdigest())
    report = check_deep(model)
    assert report.findings == [] and report.is_verified
    assert report.conclusion() == "All 1 shards were compared with the sha256 of their download."
    damage.overwrite(shard, shard.stat().st_size - 1, b"\x99")
    found = of(check_deep(model), "error")
    assert [finding.where for finding in found] == [SHARD] and "sha256" in found[0].message


def test_small_files_are_compared_with_their_download_too(model: Path) -> None:
    record_download(model / "tiktoken.model", hashlib.sha256((model / "tiktoken.model").read_bytes()).hexdigest())
    assert check_deep(model).findings == []
    with (model / "tiktoken.model").open("ab") as file:
        file.write(b"\n")
    assert [str(finding) for finding in check_deep(model).findings] == ["tiktoken.model: differs from its download"]


def test_the_hub_caches_blob_names_are_checksums(tmp_path: Path, model: Path) -> None:
    digest = hashlib.sha256((model / SHARD).read_bytes()).hexdigest()
    os.rename(model / SHARD, tmp_path / digest)
    (model / SHARD).symlink_to(tmp_path / digest)
    assert download_sha256(model / SHARD) == digest
    assert check_deep(model).checked_files == 1
    assert download_sha256(model / "config.json") is None


@pytest.mark.parametrize("text", ["no json", '{"algorithm": "md5", "tensors": {}}', "[]"])
def test_unusable_checksum_files_are_reported(model: Path, text: str) -> None:
    (model / CHECKSUMS).write_text(text)
    report = check_deep(model)
    assert [finding.where for finding in report.findings] == [CHECKSUMS]
    assert report.checked_tensors == 0


def test_header_findings_are_kept(model: Path) -> None:
    damage.rewrite_header(model / SHARD, lambda header: header[NORM].update(dtype="F16"))
    report = check_deep(model)
    assert [finding.where for finding in of(report, "error")] == [NORM]
