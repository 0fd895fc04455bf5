"""The skills by name, and endless cases of each, split so that no test case was ever trained on."""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Literal

from hybrid.evaluation.arithmetic import arithmetic, arithmetic_instant
from hybrid.evaluation.case import Case
from hybrid.evaluation.lists import copy, count, sort
from hybrid.evaluation.lookup import lookup
from hybrid.evaluation.tools import tool_call, tool_multi, tool_refusal

Split = Literal["train", "test"]
SKILLS: dict[str, Callable[[random.Random], Case]] = {
    "arithmetic": arithmetic,
    "arithmetic_instant": arithmetic_instant,
    "copy": copy,
    "count": count,
    "sort": sort,
    "lookup": lookup,
    "tool_call": tool_call,
    "tool_multi": tool_multi,
    "tool_refusal": tool_refusal,
}


def cases(skill: str, split: Split, seed: int, count: int | None = None) -> Iterator[Case]:
    """`count` cases of one skill, endlessly many if None: the same ones for the same seed."""
    rng = random.Random(f"{skill} {split} {seed}")
    return islice(_drawn(skill, split, rng), count)


def draw(skill: str, split: Split, rng: random.Random) -> Case:
    """One case."""
    return next(_drawn(skill, split, rng))


def _drawn(skill: str, split: Split, rng: random.Random) -> Iterator[Case]:
    make = SKILLS[skill]
    while True:
        case = make(rng)
        if case.split == split:
            yield case
