"""The checkpoint a pack is made from: its parts, which files they lie in, and which of those are still needed.

A part is what is written at once: a layer in five digits ("00007"), "tables" (embedding, final norm, head) or "vision".
"""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from hybrid.checkpoint import Checkpoint, hf
from hybrid.checkpoint.deep import download_sha256
from hybrid.checkpoint.durable import sync
from hybrid.checkpoint.header import REFETCH, damaged, read_header
from hybrid.checkpoint.manifest import MANIFEST, UNFINISHED, FileRecord, fingerprint, is_pack
from hybrid.checkpoint.names import is_vision, layer_of, normalise
from hybrid.checkpoint.write import CHECKSUMS, INDEX
from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError, UsageError

# What describes a model beside its weights. Never code: nothing from a model directory is executed.
DESCRIPTIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "THIRD_PARTY*")
NOT_COPIED = (INDEX, CHECKSUMS, MANIFEST, UNFINISHED)
BLOCK = 1 << 22


@dataclass
class Source:
    """A model directory as released, of which finished shards may have been deleted."""

    directory: Path
    config: ModelConfig
    config_sha256: str
    parts: dict[str, list[str]]  # part -> names of its tensors that are not routed experts
    shards: dict[str, set[str]] = field(default_factory=dict)  # every shard -> the parts it holds something of

    def sizes(self) -> dict[str, int]:
        """Bytes of the shards that are there."""
        paths = {name: self.directory / name for name in self.shards}
        return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}

    def open(self, finished: Collection[str]) -> Checkpoint:
        """The weights that are still there. Raises CheckpointError if a part that is not finished lacks its shard."""
        present = self.sizes()
        lost = sorted(name for name in self.shards.keys() - present if self.shards[name] - set(finished))
        if lost:
            needed = min(self.shards[lost[0]] - set(finished))
            raise CheckpointError(f"{self.directory} lacks {lost[0]}, which part {needed} is made from.", REFETCH)
        if len(present) == len(self.shards):
            checkpoint = hf.open_checkpoint(self.directory)
        else:
            raw = hf.read_json(self.directory / "config.json")
            headers = [read_header(self.directory / name) for name in sorted(present)]
            checkpoint = Checkpoint(self.directory, raw, {}, headers)
        return checkpoint

    def descriptions(self) -> list[Path]:
        """The small files to copy."""
        files = (path for path in sorted(self.directory.iterdir()) if path.is_file() and path.name not in NOT_COPIED)
        return [path for path in files if any(fnmatch(path.name, pattern) for pattern in DESCRIPTIONS)]


def read_source(path: Path) -> Source:
    """Look at a model directory: configuration and names only.

    Raises CheckpointError if it is none, UsageError if it has no routed experts or is a pack already.
    """
    directory = hf.model_directory(path)
    if is_pack(directory):
        raise UsageError(f"{path} is a pack already.", "Quantize the checkpoint it was made from.")
    raw = hf.read_json(directory / "config.json")
    config = ModelConfig.from_dict(raw)
    if not config.moe_layers:
        raise UsageError(f"{path} has no routed experts.", "There is nothing to quantize.")
    source = Source(directory, config, fingerprint(raw), {name: [] for name in part_names(config)})
    for stored, shard in _weight_map(directory).items():
        held = source.shards.setdefault(shard, set())
        name = normalise(stored)
        part = part_of(name, config) if name else None
        if name and part is not None:
            held.add(part)
            if ".mlp.experts." not in name:
                source.parts[part].append(name)
    return source


def part_names(config: ModelConfig) -> Iterator[str]:
    """In the order in which they are written."""
    yield from ("tables", "vision")
    yield from (layer_part(layer) for layer in range(config.num_hidden_layers))


def layer_part(layer: int) -> str:
    return f"{layer:05}"


def part_of(name: str, config: ModelConfig) -> str | None:
    """The part of a normalised name; None for prediction layers, which are never run."""
    layer = layer_of(name)
    if layer is None:
        return "vision" if is_vision(name) else "tables"
    return layer_part(layer) if layer < config.num_hidden_layers else None


def _weight_map(directory: Path) -> dict[str, str]:
    """Stored tensor name -> shard."""
    if (directory / INDEX).exists():
        return hf.read_index(directory / INDEX)
    if not (directory / hf.SINGLE).is_file():
        raise CheckpointError(f"{directory} has neither {INDEX} nor {hf.SINGLE}.", REFETCH)
    return dict.fromkeys(read_header(directory / hf.SINGLE).entries, hf.SINGLE)


def shard_record(path: Path) -> FileRecord:
    """Size and sha256 of a shard. Raises CheckpointError if its download recorded another."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    recorded = download_sha256(path)
    if recorded not in (None, digest.hexdigest()):
        raise damaged(path, "its sha256 is not that of its download")
    return FileRecord(path.stat().st_size, digest.hexdigest())


def require_deletable(source: Source) -> None:
    """Raise UsageError for shards that are links: what they point to may belong to something else."""
    links = [name for name in source.shards if (source.directory / name).is_symlink()]
    if links:
        raise UsageError(
            f"{source.directory / links[0]} is a link, and --delete-source removes only files of the directory itself.",
            "Leave that option out, or put the shards there.",
        )


def delete_shard(path: Path) -> None:
    """Give the shard's space back."""
    path.unlink(missing_ok=True)
    sync(path.parent)
