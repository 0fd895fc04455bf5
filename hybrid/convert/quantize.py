"""A checkpoint into a pack, part by part, in one command that can be killed at any moment and run again.

Every part is read, encoded, written, flushed and recorded before the next one begins; the shards of the source that no
later part needs may then be deleted, so that the two copies never have to exist together. The bytes of the pack depend
on the source, the arguments and this program, not on when or how often the work was interrupted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hybrid.checkpoint.blob import Shapes
from hybrid.checkpoint.calibration import open_calibration
from hybrid.checkpoint.durable import alone, explained
from hybrid.checkpoint.manifest import Manifest, is_pack, read_manifest
from hybrid.convert.experts import worker_count
from hybrid.convert.plan import SHARDS, Plan, Settings, arguments, make_plan, require_same
from hybrid.convert.run import Reports, Run, require_space
from hybrid.convert.source import Source, delete_shard, read_source, require_deletable, shard_record
from hybrid.convert.staging import Staging
from hybrid.device import default_threads
from hybrid.errors import UsageError


def quantize(
    source: Path,
    target: Path,
    settings: Settings,
    *,
    threads: int | None = None,
    delete_source: bool = False,
    reports: Reports | None = None,
) -> Path:
    """Make the pack `target` from the model directory `source`, or continue to, or find it made; returns `target`.

    Raises UsageError for arguments that differ from those it was begun with, DoesNotFit when memory or disk are too
    small, CheckpointError for a source that is damaged. What was finished before is kept for the next run.
    """
    found, staging = read_source(source), Staging(target)
    if delete_source:
        require_deletable(found)
    if not _is_made(found, target, settings):
        with explained(target), _begun(staging):
            if not staging.is_whole:
                _write(found, staging, settings, threads, delete_source, reports or Reports())
            require_same(read_manifest(staging.directory).made_with, arguments(found, settings), staging.directory)
            staging.rename()
    if delete_source:
        _delete_rest(found, read_manifest(target))
    return target


def _is_made(source: Source, target: Path, settings: Settings) -> bool:
    """Whether an earlier run finished. Raises UsageError if something else is there."""
    if target.exists():
        wanted = arguments(source, settings)
        made_with = read_manifest(target).made_with if is_pack(target) else {}
        if not made_with or made_with != {name: wanted.get(name) for name in made_with}:
            raise UsageError(f"{target} already exists.", f"Check it: kimi-local doctor {target}, or name another.")
    return target.exists()


def _write(
    source: Source, staging: Staging, settings: Settings, threads: int | None, delete_source: bool, reports: Reports
) -> None:
    """Everything but the renaming."""
    calibration = open_calibration(settings.calibration) if settings.calibration else None
    shapes = Shapes.of(source.config)
    workers = worker_count(shapes, threads or default_threads(), calibrated=calibration is not None)
    plan = _plan(source, staging, settings, delete_source)
    Run(source, plan, staging, calibration, workers, delete_source, reports).write_parts()
    staging.finish(_manifest(source, plan, staging))


def _delete_rest(source: Source, manifest: Manifest) -> None:
    """The shards that stayed until the pack had its name; never one that was not read."""
    for name, size in source.sizes().items():
        if name in manifest.source and manifest.source[name].size == size:
            delete_shard(source.directory / name)


@contextmanager
def _begun(staging: Staging) -> Iterator[None]:
    """The staging directory exists and is ours alone; nothing remains of it if nothing came into it."""
    staging.directory.mkdir(parents=True, exist_ok=True)
    try:
        with alone(staging.directory):
            yield
    finally:
        if staging.directory.exists() and not any(staging.directory.iterdir()):
            staging.directory.rmdir()


def _plan(source: Source, staging: Staging, settings: Settings, delete_source: bool) -> Plan:
    """The plan of the unfinished pack if there is one, else a new one, written down if the disk is large enough."""
    begun = staging.read_plan()
    if begun is not None:
        require_same(begun.arguments, arguments(source, settings), staging.directory)
        require_space(source, begun, staging, delete_source)
        return begun
    with source.open(finished=()) as checkpoint:
        plan = make_plan(source, checkpoint, settings)
    require_space(source, plan, staging, delete_source)
    staging.write_plan(plan)
    return plan


def _manifest(source: Source, plan: Plan, staging: Staging) -> Manifest:
    for name in sorted(source.sizes().keys() - staging.read_shards().keys()):  # of layers that are never run
        staging.note_shard(name, shard_record(source.directory / name))
    made_with: dict[str, Any] = {name: value for name, value in plan.arguments.items() if name != SHARDS}
    manifest = Manifest(
        config_sha256=source.config_sha256,
        seed=plan.seed,
        routed_weights=source.config.routed_params,
        made_with=made_with,
        source=staging.read_shards(),
        files={path.name: staging.copy(path) for path in source.descriptions()},
    )
    for part in plan.part_bytes(source.config):
        record = staging.read_part(part)
        if record.resident:
            manifest.residents.append(record.resident)
        if record.experts:
            manifest.layers[int(part)] = record.experts
    return manifest
