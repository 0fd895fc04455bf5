"""One step of work as the layers see it: which tokens, at which positions, of which sequences. Passed, never global."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a batch that belong to one sequence."""

    start: int  # first row in the batch
    stop: int
    past: int  # tokens of this sequence already in the cache
    page_table: tuple[int, ...]  # pages that hold the sequence, in order; enough for past + (stop - start) tokens


class Seen(NamedTuple):
    """What every row of a decode step attends to, as a card's kernel reads it: on the card, made once per step."""

    tables: Tensor  # int32 [sequences, pages]
    sequences: Tensor  # int32 [tokens], whose pages
    lengths: Tensor  # int32 [tokens], rows of them that the token sees
    longest: int


def nothing(layer: int) -> None:
    """The default `on_layer`."""


@dataclass(frozen=True)
class Batch:
    token_ids: Tensor  # int64 [tokens]
    segments: tuple[Segment, ...]
    on_layer: Callable[[int], None] = nothing  # called before each layer; may raise to abandon the step
    seen: Seen | None = None  # of a decode step on a card

    def positions(self) -> Tensor:
        """int64 [tokens]: each row's position in its own sequence."""
        parts = [torch.arange(s.past, s.past + s.stop - s.start) for s in self.segments]
        return torch.cat(parts).to(self.token_ids.device)
