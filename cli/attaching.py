"""`kimi-local chat` beside a running server: its model is used instead of a second copy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cli.model import Model
from cli.opening import load_kimi, servers_directory
from cli.options import ChatOptions
from hybrid.errors import UsageError

if TYPE_CHECKING:
    from hybrid.attached import Attached
    from hybrid.progress import OnProgress

AUTO, NEVER = "auto", "never"
LOADING = (
    "ctx", "threads", "device", "activations", "ram_budget", "gpu_experts", "kv", "kv_disk", "speculate", "verify",
)  # fmt: skip


def attach_or_load(options: ChatOptions, on_progress: OnProgress) -> Model:
    """The model of a server on this machine, if there is one that serves what is asked for; else one loaded here."""
    return attach(options) or load_kimi(options, on_progress)


def attach(options: ChatOptions) -> Attached | None:
    """The server's model that `options` lead to, if any.

    Raises UsageError for options that contradict each other, KimiError for a server that does not let us in.
    """
    from hybrid.attached import Attached
    from hybrid.running import running

    flags = [name for name in LOADING if options.origins.get(name) == "flag"]
    if options.attach not in (AUTO, NEVER):
        if flags:
            given = "--" + flags[0].replace("_", "-")
            raise UsageError(f"{given} says how to load a model, --attach that none is loaded.", "Choose one.")
        return Attached(options.attach, api_key=options.api_key, path=_path_behind(options.attach))
    if flags or options.attach == NEVER:
        return None
    for server in running(servers_directory()):
        if server.serves(options.model):
            return Attached(server.address, api_key=options.api_key, path=server.path)
    return None


def _path_behind(address: str) -> Path | None:
    """Of the model of a server on this machine."""
    from hybrid.running import running

    known = {server.address: server.path for server in running(servers_directory())}
    path = known.get(address.rstrip("/").removesuffix("/v1"))
    return None if path is None else Path(path)


def arrival(kimi: Model) -> str:
    """What to tell of a model that a server has; empty for one that is loaded here."""
    from hybrid.attached import Attached

    return f"attached to the server at {kimi.address} ({kimi.name})" if isinstance(kimi, Attached) else ""
