"""What a job will take on this machine: sequences that fit at once, and hours, both from the memory plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.batch.jobs import Job, shared_tokens
from hybrid.memory.known import known, options_for
from hybrid.memory.kv_cache import PAGE_SIZE, pages_for
from hybrid.memory.place import NVME
from hybrid.memory.plan import choose, make_plan
from hybrid.memory.rates import kernel_speeds, rates, this_machine

MOST = 64  # sequences at once: beyond it nearly every expert is read for every token anyway


def sequences(directory: Path, jobs: Sequence[Job], *, kv: str = "bf16") -> int:
    """How many of `jobs` fit at once beside the model, MOST at most; 1 if the plan has no room for more. `kv` as
    `Options` has it.

    Experts on a drive take what memory there is: there a cache for more sequences would cost what it gains.
    """
    found, machine = known(str(directory)), this_machine(with_gpu=False)
    rooms = sorted((len(job.prompt) + job.longest for job in jobs), reverse=True)
    for count in range(min(MOST, len(jobs)), 1, -1):
        mean = -(-sum(rooms[:count]) // count)
        placement = choose(found.config, machine, options_for(found, machine, ctx=mean, batch=count, kv=kv))
        if placement.fits and placement.tier != NVME:
            return count
    return 1


def room_for(jobs: Sequence[Job], batch: int) -> int:
    """Tokens of KV cache in which any `batch` of `jobs` have room."""
    pages = sorted((pages_for(len(job.prompt) + job.longest) for job in jobs), reverse=True)
    return sum(pages[:batch]) * PAGE_SIZE


@dataclass(frozen=True)
class Estimate:
    """Exact counts of tokens and predicted speeds; `new_tokens` is the most that may be written."""

    lines: int
    prompt_tokens: int
    shared_tokens: int
    new_tokens: int
    batch: int
    prefill_tok_s: float
    decode_tok_s: float
    decode_alone_tok_s: float

    @property
    def prompt_hours(self) -> float:
        return (self.prompt_tokens - self.shared_tokens) / self.prefill_tok_s / 3600

    @property
    def hours(self) -> float:
        """If every answer becomes as long as it may."""
        return self.prompt_hours + self.new_tokens / self.decode_tok_s / 3600

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "prompt_hours": self.prompt_hours,
            "hours_at_most": self.hours,
        }


def estimate(directory: Path, jobs: Sequence[Job], batch: int, *, kv: str = "bf16") -> Estimate | None:
    """The figures for `jobs`; None where the model does not fit, and so nothing can be predicted, or none is left."""
    if not jobs:
        return None
    found, machine = known(str(directory)), this_machine(with_gpu=False)
    speeds = rates(machine, measured=kernel_speeds(rates(machine).cores))
    longest = max(len(job.prompt) + job.longest for job in jobs)
    asked = [options_for(found, machine, ctx=longest, batch=n, kv=kv) for n in (batch, 1)]
    plans = [make_plan(found.config, machine, options, speeds=speeds) for options in asked]
    many, one = (made.predicted for made in plans)
    if many is None or one is None:
        return None
    return Estimate(
        len(jobs),
        sum(len(job.prompt) for job in jobs),
        shared_tokens(jobs),
        sum(job.longest for job in jobs),
        batch,
        many.prefill_tok_s.value,
        many.decode_tok_s.value,
        one.decode_tok_s.value,
    )
