"""Facts kept as JSON in the user's cache, from one run to the next. They make runs better, and none depends on them."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def recall(path: Path) -> dict[str, Any]:
    """What was remembered in a file; nothing if it cannot be read or is something else."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def remember(path: Path, facts: dict[str, Any]) -> None:
    """Keep `facts` instead of what the file holds, whole or not at all; where it cannot be written, nothing is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".new")
        with os.fdopen(handle, "w") as file:
            json.dump(facts, file, separators=(",", ":"))
        os.replace(name, path)
    except OSError as error:
        log.debug("%s: %s: what was to be remembered is not kept", path, error)
