"""Models to plan for: what a name, a config.json or a directory says, read without weights and without torch; and what
a plan is asked of them."""

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError
from hybrid.memory.hardware import Hardware
from hybrid.memory.parts import Mix, Resident
from hybrid.memory.place import Options

if TYPE_CHECKING:
    from hybrid.checkpoint import Checkpoint
    from hybrid.checkpoint.manifest import Manifest

BUILT_IN = Path(__file__).parent / "models"
REPOS = {"k2.5": "moonshotai/Kimi-K2.5", "k2-thinking": "moonshotai/Kimi-K2-Thinking"}


class Known(NamedTuple):
    """A model as a plan sees it. A pack brings the formats of its experts; any whose weights are here may keep resident
    ones as codes, and have counts of how its experts were chosen."""

    directory: str  # as commands name it
    config: ModelConfig
    repo: str = ""  # where a model that is only a name can be fetched
    stored: Mix | None = None
    stored_resident: str = "bf16"
    stored_weights: Resident | None = None  # what they take, where some are kept as codes
    counts: np.ndarray | None = None  # int64 [layers, experts] of all recorded runs


def known(model: str) -> Known:
    """`model`: k2.5, k2-thinking, a config.json, or a directory with one, released or a pack.

    Raises CheckpointError, one line, if there is no such file or it describes no model this program runs.
    """
    if model in REPOS and not Path(model).exists():
        config = ModelConfig.from_dict(_read(BUILT_IN / f"{model}.json"))
        return Known(REPOS[model].partition("/")[2], config, REPOS[model])
    path = Path(model).expanduser()
    if not path.exists():
        names = " or ".join(REPOS)
        raise CheckpointError(f"There is no model {model} here.", f"Name a directory, a config.json, {names}.")
    if path.is_dir() and (path / "manifest.json").is_file():
        return _pack(path)
    directory, file = (path, path / "config.json") if path.is_dir() else (path.parent, path)
    found = Known(str(directory), ModelConfig.from_dict(_read(file)))
    has_weights = file.name == "config.json" and any(directory.glob("*.safetensors"))
    return (has_weights and _opened(directory)) or found


def _read(path: Path) -> dict[str, Any]:
    remedy = "A plan needs the model's config.json."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}.", remedy) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON.", remedy) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object.", remedy)
    return content


def _pack(path: Path) -> Known:
    from hybrid.checkpoint.names import normalise
    from hybrid.checkpoint.pack_check import scan_pack

    scan = scan_pack(path)
    names = {normalise(name) or "" for record in scan.manifest.residents for name in record.crc32}
    return _opened(path) or _known(path, scan.config, names, scan.manifest)


def _opened(path: Path) -> Known | None:
    """What the weights in a directory say too; None if they cannot be opened, which a plan does not ask for."""
    from hybrid.checkpoint import open_checkpoint
    from hybrid.memory.router_stats import read_counts, stats_file

    try:
        with open_checkpoint(path) as checkpoint:
            found = of_checkpoint(checkpoint)
            counts = read_counts(stats_file(checkpoint), found.config)
    except CheckpointError:
        return None
    return found._replace(counts=counts)


def of_checkpoint(checkpoint: "Checkpoint") -> Known:
    """A model that is open already; what was recorded of it is not looked for."""
    from hybrid.checkpoint import Pack

    manifest = checkpoint.manifest if isinstance(checkpoint, Pack) else None
    return _known(checkpoint.path, checkpoint.config, set(checkpoint.names()), manifest)


def _known(path: Path, config: ModelConfig, names: Collection[str], manifest: "Manifest | None") -> Known:
    from hybrid.memory.stored import as_stored

    kind, weights = as_stored(config, names) or ("bf16", None)
    if manifest is None:
        return Known(str(path), config, stored_resident=kind, stored_weights=weights)
    formats = Counter((gate_up, down) for layer in manifest.layers.values() for gate_up, down in layer.formats)
    return Known(str(path), config, "", Mix(dict(formats)), kind, weights)


STORED = "stored"  # instead of a format of experts: that which the model has


def options_for(
    found: Known,
    hardware: Hardware,
    *,
    ctx: int | None = None,
    experts: str = STORED,
    running: bool = False,
    **asked: Any,
) -> Options:
    """What to ask of a plan for `found` on `hardware`: the one place where facts of both and a person's wishes meet.

    ctx None is the usual context, or the model's if that is shorter. `asked` are more fields of `Options`. With
    `running` the plan is for this process, which is up: what is not available on `hardware` is taken.
    """
    if experts == STORED:
        experts = "native" if found.stored is None else "auto"
    if running:
        asked["reserve"] = hardware.ram_total - hardware.ram_available
    return Options(
        ctx=min(Options.ctx, found.config.max_position_embeddings) if ctx is None else ctx,
        experts=experts,
        stored=found.stored if experts == "auto" else None,
        stored_resident=found.stored_resident,
        stored_weights=found.stored_weights,
        counts=found.counts,
        running=running,
        **asked,
    )
