"""The directory of a pack in the making: `DST.partial`, renamed to DST when nothing is missing.

    quantize.json               the plan
    source.json                 size and sha256 of every source shard that was read
    part-00001.json             there when everything of that part is on the disk: what the manifest will say of it
    experts-00001.bin.partial   a layer in the making, and experts-00001.jsonl, its journal

Each step is on the disk before the next one begins, so whatever is there when a process dies is either whole under its
name or made again.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.checkpoint.blob import FORMATS
from hybrid.checkpoint.durable import sync, write_durably
from hybrid.checkpoint.hf import read_json
from hybrid.checkpoint.manifest import (
    MANIFEST,
    UNFINISHED,
    FileRecord,
    LayerRecord,
    Manifest,
    ResidentRecord,
    layer_form,
    parse_layer,
    parse_resident,
    render,
    resident_form,
)
from hybrid.convert.plan import Plan


class PartRecord(NamedTuple):
    """What a finished part consists of; either half may be absent."""

    resident: ResidentRecord | None
    experts: LayerRecord | None


class Staging:
    """Paths and records of an unfinished pack."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.directory = target.with_name(f"{target.name}.partial")

    # -- the plan -----------------------------------------------------------------------------------------------------
    def read_plan(self) -> Plan | None:
        path = self.directory / UNFINISHED
        return Plan.read(path) if path.exists() else None

    def write_plan(self, plan: Plan) -> None:
        write_durably(self.directory / UNFINISHED, plan.to_json())

    # -- the parts ----------------------------------------------------------------------------------------------------
    def finished(self) -> list[str]:
        """Names of the finished parts."""
        return [path.stem.removeprefix("part-") for path in sorted(self.directory.glob("part-*.json"))]

    def read_part(self, part: str) -> PartRecord:
        content = read_json(self._part(part))
        resident, experts = content["resident"], content["experts"]
        return PartRecord(
            parse_resident(resident["file"], resident) if resident else None,
            parse_layer(experts, list(FORMATS)) if experts else None,
        )

    def write_part(self, part: str, record: PartRecord) -> None:
        """Declare a part finished: its files must be on the disk, the experts still under their partial name."""
        resident = record.resident and {"file": record.resident.file, **resident_form(record.resident)}
        experts = layer_form(record.experts) if record.experts else None
        content = json.dumps({"resident": resident, "experts": experts}, separators=(",", ":"))
        write_durably(self._part(part), content.encode() + b"\n")
        if record.experts:
            self.settle(record.experts.file)

    def settle(self, file: str) -> None:
        """Give a finished layer its final name and drop its journal."""
        if self.partial(file).exists():
            os.replace(self.partial(file), self.directory / file)
            sync(self.directory)
        self.journal(file).unlink(missing_ok=True)

    def _part(self, part: str) -> Path:
        return self.directory / f"part-{part}.json"

    def partial(self, file: str) -> Path:
        return self.directory / f"{file}.partial"

    def journal(self, file: str) -> Path:
        return (self.directory / file).with_suffix(".jsonl")

    # -- the source ---------------------------------------------------------------------------------------------------
    def read_shards(self) -> dict[str, FileRecord]:
        path = self.directory / "source.json"
        content: dict[str, Any] = read_json(path) if path.exists() else {}
        return {name: FileRecord(*record) for name, record in content.items()}

    def note_shard(self, name: str, record: FileRecord) -> None:
        shards = self.read_shards() | {name: record}
        write_durably(self.directory / "source.json", json.dumps(dict(sorted(shards.items()))).encode())

    # -- the end ------------------------------------------------------------------------------------------------------
    def copy(self, path: Path) -> FileRecord:
        """Copy a small file into the pack."""
        data = path.read_bytes()
        write_durably(self.directory / path.name, data)
        return FileRecord(len(data), hashlib.sha256(data).hexdigest())

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest; only the renaming is missing then."""
        write_durably(self.directory / MANIFEST, render(manifest))
        (self.directory / UNFINISHED).unlink()  # from here on the records of the parts are not needed
        sync(self.directory)

    def rename(self) -> None:
        """The last step: no scaffolding remains."""
        for pattern in ("*.partial", "*.jsonl", "*.new", "part-*.json", "source.json"):
            for path in self.directory.glob(pattern):
                path.unlink()
        sync(self.directory)
        os.rename(self.directory, self.target)
        sync(self.target.parent)

    @property
    def is_whole(self) -> bool:
        """Whether only the renaming is missing."""
        return (self.directory / MANIFEST).exists() and not (self.directory / UNFINISHED).exists()

    def free(self) -> int:
        """Bytes free on the disk of the pack, what an unfinished layer occupies included: that is written again."""
        partial = sum(path.stat().st_blocks * 512 for path in self.directory.glob("*.partial"))
        return shutil.disk_usage(self.directory).free + partial
