"""Models to plan for: what a name, a config.json or a directory says, read without weights and without torch."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError
from hybrid.memory.parts import Mix

BUILT_IN = Path(__file__).parent / "models"
REPOS = {"k2.5": "moonshotai/Kimi-K2.5", "k2-thinking": "moonshotai/Kimi-K2-Thinking"}


class Known(NamedTuple):
    """A model as a plan sees it. A pack brings the formats of its experts and what its resident weights are kept in."""

    directory: str  # as commands name it
    config: ModelConfig
    repo: str = ""  # where a model that is only a name can be fetched
    stored: Mix | None = None
    stored_resident: str = "bf16"


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
    return Known(str(directory), ModelConfig.from_dict(_read(file)))


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
    from collections import Counter

    from hybrid.checkpoint.pack_check import scan_pack

    scan = scan_pack(path)
    manifest = scan.manifest
    counts = Counter((gate_up, down) for layer in manifest.layers.values() for gate_up, down in layer.formats)
    return Known(str(path), scan.config, "", Mix(dict(counts)), str(manifest.made_with.get("resident", "bf16")))
