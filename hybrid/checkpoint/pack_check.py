"""Checking a pack: its manifest against its files from headers alone, then every byte against its checksum."""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid.checkpoint.blob import FORMATS, Shapes, place
from hybrid.checkpoint.check import Finding, Scan, check_text_files, compare, locate_all
from hybrid.checkpoint.deep import CHUNK, READERS, DeepReport, Meter
from hybrid.checkpoint.expected import FLOATS, Spec, expected_tensors
from hybrid.checkpoint.header import REFETCH, Header, damaged, read_header
from hybrid.checkpoint.hf import model_directory, read_json
from hybrid.checkpoint.manifest import MANIFEST, LayerRecord, Manifest, ResidentRecord, fingerprint, read_manifest
from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError
from hybrid.progress import OnProgress, ignore

CONFIG = "config.json"


@dataclass
class PackScan(Scan):
    """All that the manifest and the headers tell about a pack."""

    manifest: Manifest = Manifest("", 0, 0, {})

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors and experts."""
        return super().num_bytes + self.manifest.expert_bytes

    def load_bytes(self, dtype_size: int = 2) -> dict[str, int]:
        """As for any model; "routed_experts" are the blobs."""
        return super().load_bytes(dtype_size) | {"routed_experts": self.manifest.expert_bytes}

    def expected(self, dtypes: Mapping[str, str]) -> dict[str, Spec]:
        """The tensors of the resident files, in any float that loading converts."""
        specs = expected_tensors(self.config, dtypes).items()
        return {name: _loadable(name, spec) for name, spec in specs if ".mlp.experts." not in name}


def _loadable(name: str, spec: Spec) -> Spec:
    return Spec(spec.shape, spec.dtypes | FLOATS) if spec.dtypes & FLOATS and "weight_scale" not in name else spec


def scan_pack(path: Path | str) -> PackScan:
    """Read manifest, small files and headers, and compare.

    Raises CheckpointError if the manifest or config.json is missing or damaged; everything else becomes a Finding.
    """
    directory = model_directory(path)
    manifest = read_manifest(directory)
    raw = _config(directory, manifest)
    result = PackScan(directory, ModelConfig.from_dict(raw), manifest=manifest)
    if fingerprint(raw) != manifest.config_sha256:
        result.note("error", CONFIG, "is not the configuration this pack was made for")
    _check_files(result)
    _check_residents(result)
    _check_layers(result)
    check_text_files(result)
    result.sort()
    return result


def _config(directory: Path, manifest: Manifest) -> dict[str, object]:
    """config.json, which everything else is judged by: so it must be the right one to the byte."""
    record, path = manifest.files.get(CONFIG), directory / CONFIG
    if record is None or hashlib.sha256(path.read_bytes()).hexdigest() != record.sha256:
        raise damaged(path, f"its sha256 is not the one in {MANIFEST}")
    return read_json(path)


def _check_files(result: PackScan) -> None:
    """Every file is there with its size, the small ones with their content, and nothing else is."""
    sizes = result.manifest.file_sizes()
    for name, size in sizes.items():
        path = result.path / name
        if not path.is_file():
            result.note("error", name, "missing")
            result.lost.add(name)
        elif path.stat().st_size != size:
            result.note("error", name, f"has {path.stat().st_size:,} bytes, {MANIFEST} says {size:,}")
            result.lost.add(name)
        elif name in result.manifest.files and _sha256(path) != result.manifest.files[name].sha256:
            result.note("error", name, f"damaged: its sha256 is not the one in {MANIFEST}")
    for path in sorted(result.path.iterdir()):
        if path.name not in sizes and path.name != MANIFEST:
            result.note("warning", path.name, f"not named in {MANIFEST}; ignored")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_residents(result: PackScan) -> None:
    for record in result.manifest.residents:
        if record.file not in result.lost:
            _check_resident(result, record)
    compare(result, locate_all(result))


def _check_resident(result: PackScan, record: ResidentRecord) -> None:
    try:
        header = read_header(result.path / record.file)
    except CheckpointError as error:
        result.note("error", record.file, error.message.removeprefix(f"{result.path / record.file} is "))
        result.lost.add(record.file)
        return
    if header_crc32(header) != record.header_crc32:
        result.note("error", record.file, f"damaged: the crc32 of its header is not the one in {MANIFEST}")
        result.lost.add(record.file)
    elif header.entries.keys() != record.crc32.keys():
        result.note("error", record.file, f"does not hold the tensors that {MANIFEST} names")
    result.headers.append(header)


def header_crc32(header: Header) -> int:
    """crc32 of everything before the first tensor."""
    with header.path.open("rb") as file:
        return zlib.crc32(file.read(header.data_start))


def _check_layers(result: PackScan) -> None:
    config, layers, weights = result.config, result.manifest.layers, result.manifest.routed_weights
    if tuple(layers) != config.moe_layers:
        result.note("error", MANIFEST, f"lists experts of {len(layers)} layers, {CONFIG} of {config.num_moe_layers}")
    if weights != config.routed_params:
        result.note("error", MANIFEST, f"counts {weights:,} weights, {CONFIG} {config.routed_params:,}")
    for layer, record in layers.items():
        for message in _layer_deviations(record, config):
            result.note("error", f"layer {layer}", f"{message} (in {MANIFEST})")


def _layer_deviations(record: LayerRecord, config: ModelConfig) -> Iterator[str]:
    if len(record.formats) != config.n_routed_experts:
        yield f"has {len(record.formats):,} experts, not {config.n_routed_experts:,}"
    used = {name for pair in record.formats for name in pair}
    unknown = sorted(used - set(FORMATS))
    if unknown:
        yield f"uses the unknown format {unknown[0]!r}"
    elif "int4_g32" in used and len(used) > 1:
        yield "mixes int4_g32 with other formats"
    else:
        offsets, size = place(Shapes.of(config), record.formats)
        if size != record.size or not np.array_equal(offsets, record.offsets):
            yield f"{record.file} does not have its experts where their formats put them"


# -- every byte -------------------------------------------------------------------------------------------------------
@dataclass
class PackReport(DeepReport):
    """Outcome of reading a pack. `num_tensors` counts resident tensors, `experts` the experts that were compared."""

    experts: int = 0

    @property
    def is_verified(self) -> bool:
        return self.checked_files == self.num_files

    def conclusion(self) -> str:
        if not self.is_verified:
            return f"{self.num_files - self.checked_files:,} of {self.num_files:,} files could not be compared."
        return f"All {self.experts:,} experts and {self.num_tensors:,} tensors were compared with {MANIFEST}."


class _Piece(NamedTuple):
    """A run of bytes with a crc32 of its own, and how a person would call it."""

    where: str
    start: int
    size: int
    crc32: int


def read_pack(headers: PackScan, on_progress: OnProgress = ignore) -> PackReport:
    """Read everything; each damaged expert, tensor or file becomes a Finding that names it."""
    report = PackReport(list(headers.findings), num_tensors=headers.num_tensors, num_bytes=headers.num_bytes)
    report.num_files = len(headers.manifest.layers) + len(headers.manifest.residents)
    meter = Meter(report.num_bytes, on_progress)
    files = dict(_pieces(headers))
    with ThreadPoolExecutor(READERS) as readers:
        try:
            for findings in readers.map(lambda path: _damaged_pieces(path, files[path], meter.add), files):
                report.findings += findings
        finally:
            meter.stopped.set()
    report.checked_files = len(files)
    report.checked_tensors = sum(len(record.crc32) for record in headers.manifest.residents)
    report.experts = sum(len(record.crc32) for record in headers.manifest.layers.values())
    return report


def _pieces(headers: PackScan) -> Iterator[tuple[Path, list[_Piece]]]:
    for layer, record in headers.manifest.layers.items():
        if record.file not in headers.lost:
            yield headers.path / record.file, list(_expert_pieces(layer, record))
    crcs = {record.file: record.crc32 for record in headers.manifest.residents}
    for header in headers.headers:
        if header.path.name not in headers.lost:
            yield header.path, list(_tensor_pieces(header, crcs[header.path.name]))


def _expert_pieces(layer: int, record: LayerRecord) -> Iterator[_Piece]:
    ends = [*record.offsets.tolist()[1:], record.size]
    for i, (start, end, crc) in enumerate(zip(record.offsets.tolist(), ends, record.crc32, strict=True)):
        yield _Piece(f"layer {layer} expert {i}", start, end - start, crc)


def _tensor_pieces(header: Header, crcs: dict[str, int]) -> Iterator[_Piece]:
    for name, entry in header.entries.items():
        if name in crcs:
            yield _Piece(name, entry.start, entry.nbytes, crcs[name])


def _damaged_pieces(path: Path, pieces: list[_Piece], count: Callable[[int], object]) -> list[Finding]:
    findings = []
    with path.open("rb", buffering=0) as file:
        for piece in sorted(pieces, key=lambda piece: piece.start):
            file.seek(piece.start)
            found, left = 0, piece.size
            while left and (data := file.read(min(CHUNK, left))):
                found, left = zlib.crc32(data, found), left - len(data)
                count(len(data))
            if found != piece.crc32:
                message = f"damaged: checksum {found:08x}, recorded {piece.crc32:08x} (in {path.name})"
                findings.append(Finding("error", piece.where, message))
    return findings


def require_sound(result: PackScan) -> None:
    """Raise CheckpointError for the first error a scan found."""
    if not result.is_sound:
        raise CheckpointError(f"{result.path} is damaged: {result.findings[0]}.", REFETCH)
