"""How far a long piece of work has come."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """`done` of `total`, in `unit`s, of one stage: demo, compile, load or prefill."""

    stage: str
    done: int
    total: int
    unit: str


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Report to nobody."""
