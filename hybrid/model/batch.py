"""One step of work as the layers see it: which tokens, at which positions, of which sequences. Passed, never global."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a batch that belong to one sequence."""

    start: int  # first row in the batch
    stop: int
    past: int  # tokens of this sequence already in the cache
    page_table: tuple[int, ...]  # pages that hold the sequence, in order; enough for past + (stop - start) tokens


def nothing(layer: int) -> None:
    """The default `on_layer`."""


@dataclass(frozen=True)
class Batch:
    token_ids: Tensor  # int64 [tokens]
    segments: tuple[Segment, ...]
    on_layer: Callable[[int], None] = nothing  # called before each layer; may raise to abandon the step

    def positions(self) -> Tensor:
        """int64 [tokens]: each row's position in its own sequence."""
        parts = [torch.arange(s.past, s.past + s.stop - s.start) for s in self.segments]
        return torch.cat(parts).to(self.token_ids.device)
