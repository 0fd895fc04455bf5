"""From options to a loaded model and a conversation with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cli.conversation import Conversation, default_system
from cli.keys import leaving_on_interrupt, on_interrupt
from cli.options import ChatOptions, Speculate
from cli.output import is_drawable
from cli.screen import ticking
from cli.settings import Settings
from cli.views import StatusLine
from hybrid.errors import KimiError

if TYPE_CHECKING:
    from cli.model import Model
    from hybrid import Kimi
    from hybrid.chat.session import Session, SessionStore
    from hybrid.progress import OnProgress, Progress
    from hybrid.stats import Stats

M = TypeVar("M")
Open = Callable[[ChatOptions, "OnProgress"], M]
OpenKimi = Callable[[ChatOptions, "OnProgress"], "Model"]
STAGES = {
    "demo": "Building the demo model (first run only)",
    "load": "Loading",
    "tier": "Filling RAM with the experts used most; the others stay on the drive",
    "card": "Copying the experts used most to the card",
    "compile": "Preparing the kernels (compiled on the first run)",
}


def load_kimi(options: ChatOptions, on_progress: OnProgress) -> Kimi:
    """The model the options name, with its tokenizer read."""
    from hybrid import Kimi

    kimi = Kimi.load(
        options.model,
        device=options.device,
        threads=options.threads,
        ctx=options.ctx,
        activations=options.activations.value,
        ram_budget=options.ram_budget,
        gpu_experts=options.gpu_experts,
        keep_stats=options.stats is not False,
        kv=options.kv.value,
        kv_disk=0 if options.no_history else options.kv_disk,
        speculate=options.speculate is Speculate.auto,
        verify=options.verify,
        on_progress=on_progress,
    )
    assert kimi.tokenizer is not None  # a second for a large vocabulary: better here than before the first answer
    return kimi


@contextmanager
def waiting(label: str, *, quiet: bool = False) -> Iterator[StatusLine | None]:
    """A line on the error stream that tells what a wait of more than a second is for; None where none is shown."""
    if quiet or not is_drawable(sys.stderr):
        yield None
        return
    status = StatusLine(sys.stderr)
    status.show(label)
    try:
        with ticking(status.tick):
            yield status
    finally:
        status.clear()


def open_with_status(options: ChatOptions, open_kimi: Open[M]) -> M:
    """The model; what is going on meanwhile is told on the error stream, unless --quiet."""
    with leaving_on_interrupt(), waiting("Starting", quiet=options.quiet) as status:
        told: set[str] = set()

        def report(progress: Progress) -> None:
            label = STAGES.get(progress.stage, progress.stage)
            if status is not None:
                status.show(label, replace(progress, unit="") if progress.stage == "demo" else progress)
            elif progress.stage in ("demo", "tier") and not options.quiet and label not in told:
                print(f"{label} ...", file=sys.stderr)  # half a minute: worth a line in any log
                told.add(label)

        return open_kimi(options, report)


def memory_ceiling(kimi: Model, stats: Stats) -> float | None:
    """This machine's memory bandwidth in GB/s, where `stats` has a figure to compare; seconds, once per machine."""
    if not stats.ram_gbps:
        return None
    with on_interrupt(lambda: None), waiting("Measuring this machine's memory bandwidth (once)"):
        return kimi.ram_ceiling_gbps()


def state_directory() -> Path:
    from platformdirs import user_state_path

    return user_state_path("kimi-local")


def servers_directory() -> Path:
    """Where running servers say that they are there."""
    return state_directory() / "servers"


def open_store() -> SessionStore:
    from hybrid.chat.session import SessionStore

    return SessionStore(state_directory() / "sessions")


def find_session(options: ChatOptions, store: SessionStore) -> Session | None:
    """The saved conversation to continue, if one was asked for. Raises KimiError when there is none."""
    if options.session is not None:
        return store.load(options.session)
    if not options.continue_:
        return None
    session = store.latest()
    if session is None:
        raise KimiError("There is no conversation to continue.", "Start one with `kimi-local chat`.")
    return session


def with_model_of(options: ChatOptions, session: Session | None) -> ChatOptions:
    """Unless a model is named, a conversation goes on with the one it was held with, if that is still there."""
    path = session.settings.get("model_path") if session is not None else None
    if options.model is None and isinstance(path, str) and Path(path).is_dir():
        return replace(options, model=path)
    return options


def open_conversation(options: ChatOptions, kimi: Model, store: SessionStore, session: Session | None) -> Conversation:
    """A new conversation, or the saved one, with the system prompt that was asked for."""
    settings = Settings.from_options(options)
    conversation = Conversation(kimi, session or store.new(kimi.name), settings, store, saving=not options.no_history)
    if session is not None:
        conversation.resume(session)
    if options.system is not None:
        conversation.system = options.system
    elif options.system_file is not None:
        conversation.system = options.system_file.read_text(encoding="utf-8").strip()
    elif session is None:
        conversation.system = default_system(kimi)
    return conversation


def changed_model(session: Session | None, kimi: Model) -> str:
    """A warning when a conversation goes on with another model; empty otherwise."""
    if session is None or not session.model or session.model == kimi.name:
        return ""
    return f"This conversation was held with {session.model}; it continues with {kimi.name}."
