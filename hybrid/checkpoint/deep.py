"""Reading every byte of a model: checksums where any are known, and numbers that no healthy model contains.

A changed byte that leaves its number finite is visible only against a checksum. Two kinds are recognised: our own
`checksums.json` (crc32 per tensor) and the sha256 a hub download leaves beside or in the name of each file. Where
neither exists the report says so, and `write_checksums` records them for the next time.
"""

import hashlib
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybrid.checkpoint.check import Finding, Scan, scan
from hybrid.checkpoint.header import Entry, Header
from hybrid.checkpoint.hf import read_json
from hybrid.checkpoint.write import CHECKSUMS
from hybrid.errors import CheckpointError, KimiError
from hybrid.progress import OnProgress, Progress, ignore

CHUNK = 1 << 22
READERS = 4


class Bits(NamedTuple):
    """How to read a float dtype as integers: |x| orders like its bits without the sign."""

    integer: type[np.unsignedinteger[Any]]
    magnitude: int  # mask of everything but the sign
    nonfinite: int  # smallest magnitude that is Inf or NaN
    absurd: int | None  # magnitude of 2^20, larger than any weight or scale has reason to be
    normal: int  # smallest magnitude that is not subnormal


FLOAT_BITS = {
    "BF16": Bits(np.uint16, 0x7FFF, 0x7F80, 147 << 7, 1 << 7),
    "F16": Bits(np.uint16, 0x7FFF, 0x7C00, None, 1 << 10),
    "F32": Bits(np.uint32, 0x7FFFFFFF, 0x7F800000, 147 << 23, 1 << 23),
    "F8_E4M3": Bits(np.uint8, 0x7F, 0x7F, None, 1 << 3),
    "F8_E5M2": Bits(np.uint8, 0x7F, 0x7C, None, 1 << 2),
}


@dataclass
class TensorFacts:
    """What one pass over a tensor's bytes found."""

    crc: int = 0
    nonfinite: int = 0
    absurd: int = 0
    negative: int = 0
    zero: int = 0
    subnormal: int = 0
    lowest_codes: int = 0  # INT4 weights at -8, which symmetric training avoids
    values: list[int] | None = None  # of a `.weight_shape`


@dataclass
class DeepReport:
    """Outcome of reading everything. `findings` includes those of the header check."""

    findings: list[Finding] = field(default_factory=list)
    num_tensors: int = 0
    num_bytes: int = 0
    checked_tensors: int = 0  # compared with checksums.json
    checked_files: int = 0  # compared with a hub download's sha256
    num_files: int = 0
    scales: int = 0
    statistics: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)  # stored name -> crc32 as read now

    @property
    def is_verified(self) -> bool:
        """Whether every tensor byte was compared with a checksum."""
        return self.num_tensors > 0 and (
            self.checked_tensors == self.num_tensors or 0 < self.num_files == self.checked_files
        )

    def conclusion(self) -> str:
        """One sentence on what reading everything could and could not establish."""
        if self.checked_files == self.num_files > 0:
            return f"All {self.num_files:,} shards were compared with the sha256 of their download."
        if self.checked_tensors == self.num_tensors > 0:
            return f"All {self.num_tensors:,} tensors were compared with {CHECKSUMS}."
        known = []
        if self.checked_tensors:
            known.append(f"{self.checked_tensors:,} of {self.num_tensors:,} tensors with {CHECKSUMS}")
        if self.checked_files:
            known.append(f"{self.checked_files:,} of {self.num_files:,} shards with the sha256 of their download")
        compared = f"Compared: {' and '.join(known)}." if known else "No checksums are known for these files."
        return f"{compared} Elsewhere a changed byte that leaves its number finite cannot be seen."


def check_deep(path: Path | str, on_progress: OnProgress = ignore) -> DeepReport:
    """Check headers (`scan`, with its errors), then read every tensor."""
    return read_deep(scan(path), on_progress)


def read_deep(headers: Scan, on_progress: OnProgress = ignore) -> DeepReport:
    """Read every tensor of a scanned model. `on_progress` is called from several threads, one at a time."""
    known = _known_checksums(headers)
    report = DeepReport(list(headers.findings), num_files=len(headers.headers))
    report.num_tensors, report.num_bytes = headers.num_tensors, headers.num_bytes
    meter = Meter(report.num_bytes, on_progress)
    with ThreadPoolExecutor(READERS) as readers:
        try:
            for shard in readers.map(lambda header: _ShardReader(header, meter).read(), headers.headers):
                _judge_shard(report, shard, known)
        finally:
            meter.stopped.set()  # an interrupt must not wait for gigabytes
    _check_small_files(report, headers)
    return report


def write_checksums(path: Path | str, report: DeepReport) -> Path:
    """Record what a clean `report` read in checksums.json. Raises KimiError if it found errors or cannot write."""
    if any(finding.severity == "error" for finding in report.findings):
        raise CheckpointError(f"No checksums were recorded: {path} has errors.", "Fix them first.")
    target = Path(path).expanduser() / CHECKSUMS
    temporary = target.with_name(f".{CHECKSUMS}.{os.getpid()}")
    content = {"algorithm": "crc32", "tensors": report.checksums}
    try:
        with temporary.open("w") as file:
            json.dump(content, file, indent=0)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise KimiError(f"{target} cannot be written: {error.strerror}.", "Make the directory writable.") from error
    return target


class Meter:
    """Adds up progress over the reading threads, and tells them to stop."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self.stopped = threading.Event()
        self._total, self._done = total, 0
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._on_progress(Progress("check", self._done, self._total, "B"))


@dataclass
class _Shard:
    """One shard, read."""

    header: Header
    tensors: dict[str, TensorFacts] = field(default_factory=dict)
    sha256: str | None = None
    expected_sha256: str | None = None
    problem: str | None = None


class _ShardReader:
    """Reads one shard from front to back, in chunks that stay in the processor's cache."""

    def __init__(self, header: Header, meter: Meter) -> None:
        self._header, self._meter = header, meter
        self._result = _Shard(header, expected_sha256=download_sha256(header.path))
        self._digest = hashlib.sha256() if self._result.expected_sha256 else None
        self._buffer = bytearray(CHUNK)

    def read(self) -> _Shard:
        try:
            with self._header.path.open("rb", buffering=0) as file:
                head = file.read(self._header.data_start)
                if self._digest:
                    self._digest.update(head)
                for name, entry in sorted(self._header.entries.items(), key=lambda item: item[1].start):
                    self._result.tensors[name] = self._tensor(name, entry, file.readinto)
        except (OSError, EOFError) as error:
            self._result.problem = f"cannot be read to its end: {error}"
            return self._result
        self._result.sha256 = self._digest.hexdigest() if self._digest else None
        return self._result

    def _tensor(self, name: str, entry: Entry, readinto: Callable[[memoryview], int | None]) -> TensorFacts:
        facts = TensorFacts()
        remaining = entry.nbytes
        while remaining and not self._meter.stopped.is_set():
            view = memoryview(self._buffer)[: min(CHUNK, remaining)]
            _fill(view, readinto)
            if self._digest:
                self._digest.update(view)
            facts.crc = zlib.crc32(view, facts.crc)
            examine(facts, name, entry.dtype, np.frombuffer(view, dtype=np.uint8))
            remaining -= len(view)
            self._meter.add(len(view))
        return facts


def _fill(view: memoryview, readinto: Callable[[memoryview], int | None]) -> None:
    filled = 0
    while filled < len(view):
        count = readinto(view[filled:])
        if not count:
            raise EOFError("the file ends early")
        filled += count


def examine(facts: TensorFacts, name: str, dtype: str, data: np.ndarray) -> None:
    """Add what `data` (uint8, a whole number of elements) shows to `facts`."""
    if name.endswith(".weight_packed"):
        facts.lowest_codes += int(np.count_nonzero(data & 15 == 0)) + int(np.count_nonzero(data < 16))
    elif name.endswith(".weight_shape"):
        facts.values = data.view("<i8" if dtype == "I64" else "<i4").tolist()
    bits = FLOAT_BITS.get(dtype)
    if bits is None:
        return
    values = data.view(bits.integer)
    magnitude = values & bits.integer(bits.magnitude)
    largest = int(magnitude.max())
    if largest >= bits.nonfinite:
        facts.nonfinite += int(np.count_nonzero(magnitude >= bits.nonfinite))
    if bits.absurd and largest >= bits.absurd:
        facts.absurd += int(np.count_nonzero((magnitude >= bits.absurd) & (magnitude < bits.nonfinite)))
    if is_scale(name):
        facts.zero += int(np.count_nonzero(magnitude == 0))
        facts.negative += int(np.count_nonzero((values > bits.magnitude) & (magnitude > 0)))
        facts.subnormal += int(np.count_nonzero((magnitude > 0) & (magnitude < bits.normal)))


def is_scale(name: str) -> bool:
    return name.endswith((".weight_scale", ".weight_scale_inv"))


def _judge_shard(report: DeepReport, shard: _Shard, known: dict[str, str]) -> None:
    where = shard.header.path.name
    if shard.problem:
        report.findings.append(Finding("error", where, shard.problem))
    if shard.sha256 is not None:
        report.checked_files += 1
        if shard.sha256 != shard.expected_sha256:
            message = f"damaged: its sha256 is {shard.sha256}, the download's was {shard.expected_sha256}"
            report.findings.append(Finding("error", where, message))
    for name, facts in shard.tensors.items():
        report.findings += _judge(name, facts, shard.header, known)
        report.checked_tensors += name in known
        report.checksums[name] = f"{facts.crc:08x}"
        _count(report, name, facts, shard.header.entries[name])


def _judge(name: str, facts: TensorFacts, header: Header, known: dict[str, str]) -> Iterator[Finding]:
    where = f" (in {header.path.name})"
    if known.get(name, f"{facts.crc:08x}") != f"{facts.crc:08x}":
        yield Finding("error", name, f"damaged: checksum {facts.crc:08x}, recorded {known[name]}{where}")
    if facts.nonfinite:
        yield Finding("error", name, f"{facts.nonfinite:,} values are NaN or infinite{where}")
    if facts.absurd:
        yield Finding("warning", name, f"{facts.absurd:,} values are larger than a million{where}")
    if facts.negative:
        yield Finding("warning", name, f"{facts.negative:,} scales are negative{where}")
    if facts.values is not None:
        packed = header.entries.get(name.removesuffix("_shape") + "_packed")
        if packed and facts.values != [packed.shape[0], packed.shape[1] * 8]:
            yield Finding("error", name, f"says {facts.values}, the packed weight holds another shape{where}")


def _count(report: DeepReport, name: str, facts: TensorFacts, entry: Entry) -> None:
    if is_scale(name):
        report.scales += int(np.prod(entry.shape, dtype=np.int64))
    for key in ("zero", "negative", "subnormal", "lowest_codes"):
        report.statistics[key] = report.statistics.get(key, 0) + getattr(facts, key)


def _known_checksums(headers: Scan) -> dict[str, str]:
    """Stored tensor name -> crc32 from checksums.json; empty, with a finding, where it is absent or unusable."""
    path = headers.path / CHECKSUMS
    if not path.exists():
        return {}
    try:
        content = read_json(path)
    except CheckpointError as error:
        headers.note("error", CHECKSUMS, error.message)
        return {}
    tensors = content.get("tensors")
    if content.get("algorithm") != "crc32" or not isinstance(tensors, dict):
        headers.note("warning", CHECKSUMS, "of an unknown kind; ignored")
        return {}
    return {str(name): str(crc) for name, crc in tensors.items()}


def _check_small_files(report: DeepReport, headers: Scan) -> None:
    """Configuration and tokenizer files against the sha256 of their download."""
    for path in sorted(headers.path.iterdir()):
        expected = download_sha256(path) if path.is_file() and path.suffix != ".safetensors" else None
        if expected and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            report.findings.append(Finding("error", path.name, "differs from its download"))


_SHA256 = re.compile(r"[0-9a-f]{64}")


def download_sha256(path: Path) -> str | None:
    """The sha256 a hub download recorded for a file: in its metadata file, or in the name of the blob it links to."""
    metadata = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    try:
        lines = metadata.read_text().split("\n") if metadata.is_file() else []
    except (OSError, UnicodeDecodeError):
        lines = []
    for candidate in [*lines[1:2], path.resolve().name if path.is_symlink() else ""]:
        if _SHA256.fullmatch(candidate.strip()):
            return candidate.strip()
    return None
