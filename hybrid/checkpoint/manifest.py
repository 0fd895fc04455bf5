"""The manifest of a pack: what every file of it holds, and a checksum over every byte.

    manifest.json                 this; its last field is the sha256 of all that stands before it
    experts-00001.bin             the routed experts of layer 1, each at a multiple of 4 KiB (`blob`)
    resident-00001.safetensors    the other tensors of that layer; also resident-tables and resident-vision
    config.json, tiktoken.model   and whatever else described the model it was made from, unchanged

Experts and tensors carry a crc32, and so do the headers of the resident files; the small files carry a sha256. There
is no time and no host name in it: the same input gives the same bytes.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybrid.checkpoint.blob import FORMATS, Formats
from hybrid.checkpoint.header import REFETCH, damaged
from hybrid.errors import CheckpointError

MANIFEST = "manifest.json"
UNFINISHED = "quantize.json"  # a directory with this file is a pack in the making
FORMAT, VERSION = "kimi-local pack", 1
CHECKSUMS = "crc32 of experts, tensors and headers, sha256 of files"
_END = re.compile(rb',\n"sha256": "([0-9a-f]{64})"\n}\n')
_END_BYTES = len(',\n"sha256": "') + 64 + len('"\n}\n')


class LayerRecord(NamedTuple):
    """The routed experts of one layer. Errors are |W' - W|^2 / |W|^2 of gate_up and down, [experts, 2].

    `errors` is measured as the encoder weighted it, by calibration where there was one; `plain_errors` unweighted.
    """

    file: str
    size: int  # bytes
    offsets: np.ndarray  # int64 [experts]
    formats: list[Formats]
    crc32: list[int]  # of each blob, padding included
    errors: np.ndarray
    plain_errors: np.ndarray


class ResidentRecord(NamedTuple):
    """One safetensors file of tensors that every token needs."""

    file: str
    size: int  # bytes
    header_crc32: int  # of everything before the first tensor
    crc32: dict[str, int]  # by tensor


class FileRecord(NamedTuple):
    """A file that was copied, or one of the source."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything manifest.json says. `made_with` are the arguments that decided the pack's bytes."""

    config_sha256: str  # of config.json's content, see `fingerprint`
    seed: int  # of the rotations
    routed_weights: int
    made_with: dict[str, Any]
    source: dict[str, FileRecord] = field(default_factory=dict)
    layers: dict[int, LayerRecord] = field(default_factory=dict)
    residents: list[ResidentRecord] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def expert_bytes(self) -> int:
        return sum(record.size for record in self.layers.values())

    @property
    def resident_bytes(self) -> int:
        return sum(record.size for record in self.residents)

    @property
    def bits_per_weight(self) -> float:
        """Of the routed experts, scales and padding included."""
        return 8 * self.expert_bytes / max(1, self.routed_weights)

    def file_sizes(self) -> dict[str, int]:
        """Bytes of every file of the pack but the manifest."""
        experts = {record.file: record.size for record in self.layers.values()}
        residents = {record.file: record.size for record in self.residents}
        return experts | residents | {name: record.size for name, record in self.files.items()}


def experts_file(layer: int) -> str:
    return f"experts-{layer:05}.bin"


def resident_file(part: str) -> str:
    """`part` is a layer in five digits, "tables" (embedding, final norm, head) or "vision"."""
    return f"resident-{part}.safetensors"


def fingerprint(raw_config: Mapping[str, Any]) -> str:
    """sha256 of a configuration's content, however its JSON is laid out."""
    return hashlib.sha256(json.dumps(raw_config, sort_keys=True).encode()).hexdigest()


def is_pack(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


# -- writing ----------------------------------------------------------------------------------------------------------
def render(manifest: Manifest) -> bytes:
    """The content of manifest.json."""
    body = "{\n" + ",\n".join(_fields(manifest))
    return f'{body},\n"sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()


def _fields(manifest: Manifest) -> Iterator[str]:
    totals = {
        "routed_weights": manifest.routed_weights,
        "expert_bytes": manifest.expert_bytes,
        "resident_bytes": manifest.resident_bytes,
        "bits_per_weight": round(manifest.bits_per_weight, 4),
    }
    head = {"format": FORMAT, "version": VERSION, "checksums": CHECKSUMS, "config_sha256": manifest.config_sha256}
    head |= {"rotation_seed": manifest.seed, "made_with": manifest.made_with, "totals": totals, "formats": FORMATS}
    for name, value in head.items():
        yield f'"{name}": {json.dumps(value)}'
    yield _mapping("files", {name: list(record) for name, record in manifest.files.items()})
    yield _mapping("source", {name: list(record) for name, record in manifest.source.items()})
    yield _mapping("residents", {record.file: resident_form(record) for record in manifest.residents})
    yield _mapping("layers", {str(layer): layer_form(record) for layer, record in manifest.layers.items()})


def _mapping(name: str, values: Mapping[str, Any]) -> str:
    """One value a line: people can read it, and a line-wise comparison of two packs shows what differs."""
    lines = (f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in values.items())
    return f'"{name}": {{\n' + ",\n".join(lines) + "\n}"


def layer_form(record: LayerRecord) -> dict[str, Any]:
    """The JSON form of a layer; formats are indices into the manifest's list of them."""
    gate_up, down = zip(*record.formats, strict=True)
    return {
        "file": record.file,
        "bytes": record.size,
        "gate_up": [FORMATS.index(name) for name in gate_up],
        "down": [FORMATS.index(name) for name in down],
        "offsets": record.offsets.tolist(),
        "crc32": [f"{crc:08x}" for crc in record.crc32],
        "errors": record.errors.T.tolist(),
        "plain_errors": record.plain_errors.T.tolist(),
    }


def resident_form(record: ResidentRecord) -> dict[str, Any]:
    """The JSON form of a resident file, without its name."""
    crcs = {name: f"{crc:08x}" for name, crc in record.crc32.items()}
    return {"bytes": record.size, "header_crc32": f"{record.header_crc32:08x}", "crc32": crcs}


# -- reading ----------------------------------------------------------------------------------------------------------
def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json. Raises CheckpointError if a byte of it has changed, or it is of another version."""
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}.", REFETCH) from error
    content = _checked(path, data)
    try:
        if content["format"] != FORMAT or content["version"] != VERSION:
            what = f"{content['format']} of version {content['version']}, not {VERSION}"
            raise CheckpointError(f"{path} describes a {what}.", "Update kimi-local, or quantize again.")
        return _parse(content)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, f"it does not say what it must ({error!r})") from error


def _checked(path: Path, data: bytes) -> dict[str, Any]:
    body, end = data[:-_END_BYTES], _END.fullmatch(data[-_END_BYTES:])
    if end is None or hashlib.sha256(body).hexdigest().encode() != end[1]:
        raise damaged(path, "its last field is not the sha256 of the rest")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(path, "it is not JSON") from error
    if not isinstance(content, dict):
        raise damaged(path, "it is not a JSON object")
    return content


def _parse(content: dict[str, Any]) -> Manifest:
    names = [str(name) for name in content["formats"]]
    return Manifest(
        config_sha256=str(content["config_sha256"]),
        seed=int(content["rotation_seed"]),
        routed_weights=int(content["totals"]["routed_weights"]),
        made_with=dict(content["made_with"]),
        source={_file_name(name): FileRecord(*value) for name, value in content["source"].items()},
        layers={int(layer): parse_layer(form, names) for layer, form in content["layers"].items()},
        residents=[parse_resident(name, form) for name, form in content["residents"].items()],
        files={_file_name(name): FileRecord(*value) for name, value in content["files"].items()},
    )


def parse_layer(form: Mapping[str, Any], names: list[str]) -> LayerRecord:
    """The inverse of `layer_form`; `names` is the list its formats are indices into. Raises ValueError and the like."""
    formats = [(names[gate_up], names[down]) for gate_up, down in zip(form["gate_up"], form["down"], strict=True)]
    errors, plain = (np.array(form[key], np.float64).T for key in ("errors", "plain_errors"))
    record = LayerRecord(
        file=_file_name(form["file"]),
        size=int(form["bytes"]),
        offsets=np.array(form["offsets"], np.int64),
        formats=formats,
        crc32=[int(crc, 16) for crc in form["crc32"]],
        errors=errors,
        plain_errors=plain,
    )
    if not len(formats) == record.offsets.size == len(record.crc32) == len(errors) == len(plain):
        raise ValueError(f"{record.file} has lists of different lengths")
    return record


def parse_resident(name: str, form: Mapping[str, Any]) -> ResidentRecord:
    """The inverse of `resident_form`."""
    crcs = {str(tensor): int(crc, 16) for tensor, crc in form["crc32"].items()}
    return ResidentRecord(_file_name(name), int(form["bytes"]), int(form["header_crc32"], 16), crcs)


def _file_name(name: str) -> str:
    if Path(name).name != name or name == MANIFEST:
        raise ValueError(f"a file called {name!r}")
    return name
