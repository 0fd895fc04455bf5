"""Header-only check of a model directory: every name, shape, dtype, size and place, against its configuration.

Nothing but JSON and headers is read, so the released terabyte-class model takes seconds. All deviations are collected;
`open_checkpoint` stops at the first one that matters to it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hybrid.checkpoint.expected import Spec, expected_tensors
from hybrid.checkpoint.header import Entry, Header, read_header
from hybrid.checkpoint.hf import SINGLE, Located, is_unused_layer, loaded_bytes, model_directory, read_index, read_json
from hybrid.checkpoint.names import is_vision, layer_of, normalise
from hybrid.checkpoint.write import INDEX
from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError

__all__ = ["Finding", "Scan", "check_headers", "expected_tensors", "scan"]

TEXT_FILES = ("tiktoken.model", "tokenizer_config.json")


class Finding(NamedTuple):
    """One deviation. An error means that the model is not what its configuration describes."""

    severity: str  # error | warning | note
    where: str  # a tensor's stored name, or a file
    message: str

    def __str__(self) -> str:
        # Names come from the file: what a terminal would obey is shown, not sent.
        return f"{self.where}: {self.message}".encode("unicode_escape").decode()


@dataclass
class Scan:
    """All that headers tell about a model directory."""

    path: Path
    config: ModelConfig
    headers: list[Header] = field(default_factory=list)
    weight_map: dict[str, str] | None = None  # the index; None for a single file
    lost: set[str] = field(default_factory=set)  # names of shards that are absent or unreadable
    findings: list[Finding] = field(default_factory=list)

    @property
    def num_tensors(self) -> int:
        return sum(len(header.entries) for header in self.headers)

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(entry.nbytes for header in self.headers for entry in header.entries.values())

    @property
    def is_sound(self) -> bool:
        """Whether nothing found so far is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def load_bytes(self, dtype_size: int = 2) -> dict[str, int]:
        """Memory the text model takes once loaded, as `Checkpoint.load_bytes`."""
        entries = (item for header in self.headers for item in header.entries.items())
        named = ((normalise(stored), entry) for stored, entry in entries)
        return loaded_bytes(self.config, ((name, entry) for name, entry in named if name), dtype_size)

    def expected(self, dtypes: Mapping[str, str]) -> dict[str, Spec]:
        """What the shards must hold; `dtypes` by normalised name are what they do hold."""
        return expected_tensors(self.config, dtypes)

    def note(self, severity: str, where: str, message: str) -> None:
        self.findings.append(Finding(severity, where, message))

    def sort(self) -> None:
        """Errors first."""
        order = ("error", "warning", "note")
        self.findings.sort(key=lambda finding: order.index(finding.severity))


def check_headers(path: Path | str) -> list[Finding]:
    """Deviations of a model directory from its own config.json, errors first; see `scan`."""
    return scan(path).findings


def scan(path: Path | str) -> Scan:
    """Read configuration, index and all shard headers and compare.

    Raises CheckpointError if there is no model directory, or its config.json is unreadable or of an unsupported kind;
    everything else becomes a Finding.
    """
    directory = model_directory(path)
    result = Scan(directory, ModelConfig.from_dict(read_json(directory / "config.json")))
    _read_shards(result)
    tensors = locate_all(result)
    compare(result, tensors)
    _compare_index(result, tensors)
    check_text_files(result)
    result.sort()
    return result


def check_text_files(result: Scan) -> None:
    """The tokenizer is there, and what is JSON can be read."""
    for name in TEXT_FILES:
        if not (result.path / name).is_file():
            result.note("warning", name, "missing; without it the model cannot read or write text")
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (result.path / name).is_file():
            try:
                read_json(result.path / name)
            except CheckpointError as error:
                result.note("error", name, error.message.removeprefix(f"{result.path / name} is "))


def _read_shards(result: Scan) -> None:
    for path in _shard_paths(result):
        if not path.is_file():
            held = sum(shard == path.name for shard in (result.weight_map or {}).values())
            result.note("error", path.name, f"missing shard, with {held:,} tensors" if held else "missing shard")
            result.lost.add(path.name)
            continue
        try:
            result.headers.append(read_header(path))
        except CheckpointError as error:
            result.note("error", path.name, error.message.removeprefix(f"{path} is "))
            result.lost.add(path.name)


def _shard_paths(result: Scan) -> list[Path]:
    """Shards named by the index; without a usable one, whatever lies there."""
    index = result.path / INDEX
    if index.exists():
        try:
            result.weight_map = read_index(index)
        except CheckpointError as error:
            result.note("error", INDEX, error.message.removeprefix(f"{index} is "))
            return sorted(result.path.glob("*.safetensors"))
        named = {result.path / shard for shard in set(result.weight_map.values())}
        for stray in sorted(set(result.path.glob("*.safetensors")) - named):
            result.note("warning", stray.name, "not named in the index; ignored")
        return sorted(named)
    if not (result.path / SINGLE).exists() and any(result.path.glob("*.safetensors")):
        result.note("error", INDEX, "missing; the shards cannot be put together without it")
        return sorted(result.path.glob("*.safetensors"))
    return [result.path / SINGLE]


class Found(NamedTuple):
    """A tensor's name as stored, and its place."""

    stored: str
    located: Located


def locate_all(result: Scan) -> dict[str, Found]:
    """Tensors by normalised name; a second claim to a name is an error."""
    tensors: dict[str, Found] = {}
    for header in result.headers:
        for stored, entry in header.entries.items():
            name = normalise(stored)
            if name in tensors:
                first = tensors[name]
                result.note("error", stored, f"is in {header.path.name} and as {first.stored} in {_shard(first)}")
            elif name is not None:
                tensors[name] = Found(stored, Located(header.path, entry))
    return tensors


def _shard(tensor: Found) -> str:
    return tensor.located.shard.name


def compare(result: Scan, tensors: dict[str, Found]) -> None:
    """Names, shapes and dtypes against the configuration."""
    dtypes = {name: tensor.located.entry.dtype for name, tensor in tensors.items()}
    expected = result.expected(dtypes)
    if result.config.vision_config and result.headers and not any(map(is_vision, tensors)):
        result.note("warning", "vision_tower", "absent; the model cannot see images")
        expected = {name: spec for name, spec in expected.items() if not is_vision(name)}
    _report_missing(result, [name for name in expected if name not in tensors], tensors)
    for name, (stored, located) in tensors.items():
        for message in _deviations(located.entry, expected[name]) if name in expected else ():
            result.note("error", stored, f"{message} (in {located.shard.name})")
    extra = [name for name in tensors if name not in expected]
    unused = {name for name in extra if is_unused_layer(result.config, layer_of(name))}
    for name in extra:
        if name not in unused:
            result.note("error", tensors[name].stored, f"unexpected tensor (in {_shard(tensors[name])})")
    if unused:
        result.note("note", "prediction layers", f"{len(unused):,} tensors of layers that are never run")


def _deviations(entry: Entry, spec: Spec) -> Iterator[str]:
    if entry.shape != spec.shape:
        yield f"shape {list(entry.shape)}, expected {list(spec.shape)}"
    if entry.dtype not in spec.dtypes:
        yield f"dtype {entry.dtype}, expected {' or '.join(sorted(spec.dtypes))}"


def _report_missing(result: Scan, names: list[str], tensors: dict[str, Found]) -> None:
    """Tensors that are nowhere; those of a lost shard are covered by what was said about it."""
    if not names or (result.lost and result.weight_map is None):
        return
    indexed = {normalise(stored): (stored, shard) for stored, shard in (result.weight_map or {}).items()}
    for name in names:
        stored, shard = indexed.get(name, (_spelling(name, tensors), None))
        if shard is None:
            result.note("error", stored, "missing tensor")
        elif shard not in result.lost:
            result.note("error", stored, f"missing (the index places it in {shard})")


def _spelling(name: str, tensors: dict[str, Found]) -> str:
    """How this checkpoint would have stored a normalised name, judging by a tensor it does hold."""
    is_head = name == "lm_head.weight"
    likes = (known for known in tensors if not is_vision(known) and (known == "lm_head.weight") == is_head)
    like = next(likes, None)
    return name if is_vision(name) or like is None else tensors[like].stored.removesuffix(like) + name


def _compare_index(result: Scan, tensors: dict[str, Found]) -> None:
    """The index against what the shards really hold."""
    if result.weight_map is None:
        return
    holder = {tensor.stored: _shard(tensor) for tensor in tensors.values()}
    reported = {finding.where for finding in result.findings}
    for stored, shard in result.weight_map.items():
        found = holder.get(stored)
        if found is not None and found != shard:
            result.note("error", stored, f"the index places it in {shard}, it is in {found}")
        elif found is None and shard not in result.lost and stored not in reported and normalise(stored):
            result.note("error", stored, f"named in the index, but not in {shard}")
    for stored in holder:
        if stored not in result.weight_map and stored not in reported:
            result.note("error", stored, f"in {holder[stored]}, but not named in the index")
    metadata = read_json(result.path / INDEX).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, int) and total != result.num_bytes and not result.lost:
        result.note("warning", INDEX, f"says {total:,} bytes in total, the shards hold {result.num_bytes:,}")
