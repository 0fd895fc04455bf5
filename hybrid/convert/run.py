"""One run over the parts of a pack that are not finished yet."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hybrid.checkpoint import Checkpoint
from hybrid.checkpoint.blob import Shapes
from hybrid.checkpoint.calibration import Calibration
from hybrid.checkpoint.hf import SINGLE
from hybrid.checkpoint.manifest import FileRecord, LayerRecord, ResidentRecord, resident_file
from hybrid.convert import resident
from hybrid.convert.encode import LayerEncoder
from hybrid.convert.experts import layer_file, write_experts
from hybrid.convert.plan import Plan
from hybrid.convert.source import Source, delete_shard, layer_part, shard_record
from hybrid.convert.staging import PartRecord, Staging
from hybrid.errors import DoesNotFit
from hybrid.progress import OnProgress, Progress, ignore

HEADROOM = 16 << 20  # bytes for headers, manifest and small files


class PartDone(NamedTuple):
    """One finished part."""

    part: str
    number: int  # of `total`, from 1
    total: int
    bytes: int
    mean_error: float | None  # of its expert matrices; None for a part without experts


@dataclass(frozen=True)
class Reports:
    """Who is told what. `progress` counts weights of routed experts, those of earlier runs included."""

    progress: OnProgress = ignore
    part: Callable[[PartDone], None] = lambda done: None
    written: Callable[[int, int], None] = lambda weights, count: None  # weights and bytes of an expert of this run


@dataclass(frozen=True)
class Run:
    """What the parts have in common; `write_parts` does the work."""

    source: Source
    plan: Plan
    staging: Staging
    calibration: Calibration | None
    workers: int
    delete_source: bool
    reports: Reports

    def write_parts(self) -> None:
        """Raises CheckpointError for a source that is damaged or lacks a shard that is still needed."""
        sizes, finished = self.plan.part_bytes(self.source.config), self.staging.finished()
        self._settle(finished)
        progress = _Weights(self, [part for part in finished if part in self._layers])
        with self.source.open(finished) as checkpoint, ThreadPoolExecutor(self.workers) as pool:
            for number, (part, size) in enumerate(sizes.items(), 1):
                if part in finished:
                    continue
                record = self._write_part(part, checkpoint, pool, progress)
                finished.append(part)
                self.reports.part(PartDone(part, number, len(sizes), size, _mean_error(record)))
                self._delete_shards(finished)

    @property
    def _layers(self) -> dict[str, int]:
        return {layer_part(layer): layer for layer in self.plan.formats}

    def _settle(self, finished: list[str]) -> None:
        """Finish what a crash may have interrupted behind the record of a part."""
        for part in finished:
            experts = self.staging.read_part(part).experts
            if experts:
                self.staging.settle(experts.file)
        self._delete_shards(finished)

    def _write_part(
        self, part: str, checkpoint: Checkpoint, pool: ThreadPoolExecutor, progress: "_Weights"
    ) -> PartRecord:
        hashes = self._start_hashes(part, pool)
        written = self._write_resident(part, checkpoint, pool)
        layer = self._layers.get(part)
        experts = None if layer is None else self._write_experts(layer, checkpoint, pool, progress)
        for name, future in hashes.items():
            self.staging.note_shard(name, future.result())
        record = PartRecord(written, experts)
        self.staging.write_part(part, record)
        checkpoint.close()
        return record

    def _start_hashes(self, part: str, pool: ThreadPoolExecutor) -> dict[str, Future[FileRecord]]:
        """sha256 of the part's shards that were not read before; that also brings them into memory in one sweep."""
        known = self.staging.read_shards()
        names = [name for name, parts in self.source.shards.items() if part in parts and name not in known]
        return {name: pool.submit(shard_record, self.source.directory / name) for name in sorted(names)}

    def _write_resident(self, part: str, checkpoint: Checkpoint, pool: ThreadPoolExecutor) -> ResidentRecord | None:
        places = resident.layout(checkpoint, self.source.parts[part], self.plan.resident)
        path: Path = self.staging.directory / resident_file(part)
        return resident.write_resident(checkpoint, places, path, pool) if places else None

    def _write_experts(
        self, layer: int, checkpoint: Checkpoint, pool: ThreadPoolExecutor, progress: "_Weights"
    ) -> LayerRecord:
        shapes = Shapes.of(self.source.config)
        statistics = self.calibration.layer(layer) if self.calibration else None
        encoder = LayerEncoder(layer, shapes, self.plan.seed, statistics)
        with layer_file(self.staging, layer, shapes, self.plan.formats[layer]) as file:
            progress.add(len(file.journal.entries))
            write_experts(file, encoder, checkpoint, pool, self.workers, progress.expert_done)
            return file.record()

    def _delete_shards(self, finished: list[str]) -> None:
        """A single file stays until the very end: without it nothing would tell what the source holds."""
        if self.delete_source:
            for name, parts in self.source.shards.items():
                if name != SINGLE and parts and parts <= set(finished):
                    delete_shard(self.source.directory / name)


class _Weights:
    """Counts finished experts as weights."""

    def __init__(self, run: Run, finished_layers: list[str]) -> None:
        self._config, self._reports = run.source.config, run.reports
        self._experts = 0
        self.add(len(finished_layers) * self._config.n_routed_experts)

    def add(self, experts: int) -> None:
        self._experts += experts
        done, total = self._experts * self._config.expert_params, self._config.routed_params
        self._reports.progress(Progress("quantize", done, total, "weights"))

    def expert_done(self, size: int) -> None:
        self._reports.written(self._config.expert_params, size)
        self.add(1)


def _mean_error(record: PartRecord) -> float | None:
    return float(record.experts.errors.mean()) if record.experts else None


def require_space(source: Source, plan: Plan, staging: Staging, delete_source: bool) -> None:
    """Raise DoesNotFit, with the numbers, unless the rest of the pack fits the disk."""
    sizes = plan.part_bytes(source.config)
    frees = delete_source and on_one_disk(source.directory, staging.directory)
    needed = HEADROOM + space_needed(source, sizes, staging.finished(), frees)
    free = staging.free()
    if needed > free:
        raise DoesNotFit(
            f"{staging.target} needs {needed / 1e9:,.2f} GB more, its disk has {free / 1e9:,.2f} GB free.",
            f"Free {(needed - free) / 1e9:,.2f} GB there, or try --delete-source or fewer bits.",
        )


def on_one_disk(source: Path, target: Path) -> bool:
    """Whether what is deleted in `source` makes room for `target`, which need not exist yet."""
    existing = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    return source.stat().st_dev == existing.stat().st_dev


def space_needed(source: Source, sizes: dict[str, int], finished: list[str], frees: bool) -> int:
    """Most bytes that the rest of the work adds to the disk at any time; parts are written in the order of `sizes`.

    With `frees`, shards of the source leave the same disk as soon as nothing needs them.
    """
    shards, done = source.sizes(), set(finished)
    added = most = 0
    for part, size in sizes.items():
        if part not in done:
            added += size
            most = max(most, added)
            done.add(part)
            if frees:
                gone = [name for name in shards if source.shards[name] and source.shards[name] <= done]
                added -= sum(shards.pop(name) for name in gone if name != SINGLE)
    return most
