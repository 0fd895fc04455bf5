"""A request under way: its ids so far, the rows they have, and what of it a step takes on."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from hybrid.engine.request import Request
from hybrid.engine.sampler import Sampler
from hybrid.engine.speculation import Drafter
from hybrid.errors import KimiError


@dataclass(eq=False)
class Sequence:
    """A request with what has become of it: `ids` are its prompt and answer, `done` of them have rows in `pages`."""

    request: Request
    sampler: Sampler
    longest: int  # rows it may come to need
    ids: list[int]
    done: int = 0
    pages: list[int] = field(default_factory=list)
    found: int | None = None  # rows that were in the cache when it first started
    started: float = 0.0
    error: KimiError | None = None
    drafter: Drafter = field(default_factory=Drafter)

    @property
    def answer(self) -> list[int]:
        """The new ids, a stop id included."""
        return self.ids[len(self.request.prompt) :]

    @property
    def is_prompt(self) -> bool:
        """Whether what comes next is part of the prompt."""
        return self.done < len(self.request.prompt)

    @property
    def is_reading(self) -> bool:
        """Whether more comes next than one token of the answer: of the prompt, or of what it had to give up."""
        return self.is_prompt or self.done < len(self.ids) - 1

    @property
    def ended(self) -> bool:
        return bool(self.request.finish_reason) or self.error is not None

    def start(self, pages: list[int], rows: int, from_disk: int) -> None:
        """Go on with `pages`, which hold so many rows already, some of them just read from the disk."""
        self.pages, self.done = pages, rows
        if self.found is None:
            self.found = self.request.cached_tokens = rows
            self.request.disk_tokens = from_disk
            self.started = time.perf_counter()

    def note_layer(self, rows: int) -> None:
        """The work done on a step's layers amounts to so many rows."""
        if self.is_prompt and len(self.ids) == len(self.request.prompt):
            self.request.on_prefill(self.done + rows, len(self.request.prompt))

    def advance(self, count: int) -> None:
        """`count` more ids have their rows."""
        prompt = self.is_prompt and len(self.ids) == len(self.request.prompt)
        self.done += count
        if prompt:
            self.request.prefill_seconds = time.perf_counter() - self.started
            self.request.on_prefill(self.done, len(self.request.prompt))

    def take(self, logits: Tensor) -> None:
        """Choose the next id by logits [vocab], and note if it is the last; or note the error."""
        try:
            token = self.request.choose(self.sampler, logits, self.answer)
        except KimiError as error:
            self.error = error
            return
        self.ids.append(token)
        self.request.note_end(token, len(self.ids) - len(self.request.prompt), full=self.done >= self.longest)


class Part(NamedTuple):
    """What of a sequence is in a step: `known` of its ids, and ids drafted to follow the last."""

    sequence: Sequence
    known: int
    drafted: list[int]

    @property
    def rows(self) -> int:
        return self.known + len(self.drafted)
