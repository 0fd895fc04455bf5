"""A real, tiny model, and jobs for it. float32 throughout: answers do not depend on what is made beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid import Kimi
from hybrid.batch.jobs import Job, Prompts
from hybrid.batch.lines import Lines, read_lines
from hybrid.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def kimi(tiny: Path) -> Iterator[Kimi]:
    with Kimi.load(tiny, dtype="float32", activations="float32", threads=1, ctx=512, cache=2048) as kimi:
        yield kimi


@pytest.fixture(scope="module")
def prompts(tiny: Path) -> Prompts:
    with open_checkpoint(tiny) as checkpoint:
        return Prompts(checkpoint, 512)


def read(*objects: dict[str, Any]) -> Lines:
    found = read_lines(json.dumps(each).encode() for each in objects)
    assert not found.bad
    return found


def jobs_of(prompts: Prompts, *objects: dict[str, Any], **defaults: Any) -> list[Job]:
    jobs, refused = prompts.jobs(read(*objects).good, defaults, None)
    assert not refused
    return jobs
