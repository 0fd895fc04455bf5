"""A step, simulated: work on resources that each do one thing after another, and routing traces to replay.

A `Task` says how long it keeps each resource busy (several at once: a CPU kernel also takes memory bandwidth) and which
tasks must be done before it. Resources serve tasks in the order they are listed. What one task needs of several
resources flows at the same time, so the task ends when the slowest of them is through with it.

A trace is int64 [steps, layers, k]: the experts each layer chose, distinct within a layer. Where nothing is known of a
model's routing there are synthetic ones: popularity like Zipf's, in an order of each layer's own, and persistence from
token to token. Where earlier runs counted how often each expert was chosen, `recorded_uses` goes by that.
No trace of K2.5 has been published; the three skews are assumptions that span what is known of other models:

    FLAT      9 % of hits with 3 % of the experts cached: near what perfectly balanced routing would give
    EXPECTED  15 % of hits with 3 % cached: what to plan with
    SKEWED    44 % of the experts stay from token to token, half of the experts get 75-78 % of the uses, and the optimum
              has 54 % of hits with 3 % cached: the most that was reported of each
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

from hybrid.memory.policy import POLICIES, Foresight, Policy, belady_misses, misses

BELADY = "belady"
WARM = 0.25  # of a trace's steps fill the caches and are not counted
LAYERS, STEPS = 2, 200  # of the traces behind expectations: layers are alike, so two tell of all


@dataclass(frozen=True)
class Task:
    """Work: seconds of each resource, and the numbers of the tasks it waits for."""

    seconds: Mapping[str, float]
    after: Sequence[int] = ()


@dataclass(frozen=True)
class Timeline:
    """What a simulation gave: when all was done, and how long each resource was busy."""

    seconds: float
    busy: Mapping[str, float] = field(default_factory=dict)

    @property
    def limit(self) -> str:
        """The busiest resource."""
        return max(self.busy, key=lambda name: self.busy[name], default="nothing")


def simulate(tasks: Sequence[Task]) -> Timeline:
    """Run `tasks` in order; `after` names earlier ones by their place."""
    free: dict[str, float] = {}
    busy: dict[str, float] = {}
    ends: list[float] = []
    for task in tasks:
        ready = max((ends[number] for number in task.after), default=0.0)
        end = ready
        for resource, seconds in task.seconds.items():
            free[resource] = max(ready, free.get(resource, 0.0)) + seconds
            busy[resource] = busy.get(resource, 0.0) + seconds
            end = max(end, free[resource])
        ends.append(end)
    return Timeline(max(ends, default=0.0), busy)


class Skew(NamedTuple):
    """How uneven routing is."""

    zipf: float  # popularity of the r-th most popular expert ~ r^-zipf
    persistence: float  # chance that an expert stays chosen for the next token, over chance


FLAT, EXPECTED, SKEWED = Skew(0.3, 0.05), Skew(0.4, 0.1), Skew(0.65, 0.4)


def synthetic_trace(
    steps: int, layers: int, experts: int, k: int, skew: Skew, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A trace [steps, layers, k], and fp32 [steps, layers, experts], each expert's chance as of the step before."""
    ranks = np.array([rng.permutation(experts) for _ in range(layers)])
    appeal = -skew.zipf * np.log1p(ranks)
    popular = np.exp(appeal)
    popular /= popular.sum(axis=1, keepdims=True)
    trace = np.empty((steps, layers, k), np.int64)
    chances = np.empty((steps, layers, experts), np.float32)
    stays = np.zeros((layers, experts), bool)
    for step in range(steps):
        free = k - skew.persistence * stays.sum(axis=1, keepdims=True)
        chances[step] = np.where(stays, skew.persistence, 0) + (1 - skew.persistence * stays) * free * popular
        kept = stays & (rng.random(stays.shape) < skew.persistence)
        # The largest of values with Gumbel noise are a draw without replacement in proportion to their exponentials.
        wanted = np.where(kept, np.inf, appeal + rng.gumbel(size=appeal.shape))
        trace[step] = np.argpartition(-wanted, k - 1, axis=1)[:, :k]
        stays[:] = False
        np.put_along_axis(stays, trace[step], True, axis=1)
    return trace, chances


def hit_rate(trace: np.ndarray, experts: int, capacity: int, policy: str = "foresight") -> float:
    """Share of the uses in `trace` [steps, layers, k] found in `capacity` slots shared by all layers, once warm.

    `policy` is a key of POLICIES or "belady", the optimum.
    """
    steps, layers, k = trace.shape
    found = (
        belady_misses(trace, experts, capacity)
        if policy == BELADY
        else misses(trace, POLICIES[policy](layers, experts, capacity))
    )
    return 1 - float(found[int(WARM * steps) :].mean()) / k


def foreseeable(trace: np.ndarray, chances: np.ndarray, capacity: int) -> float:
    """Hits if slots always held what is likeliest by the true `chances`: the bound for who cannot see the future."""
    steps, layers, k = trace.shape
    share = capacity // layers
    first = int(WARM * steps)
    held = np.argpartition(-chances[first:], share - 1, axis=2)[:, :, :share] if share else chances[first:, :, :0]
    hits = (trace[first:, :, :, None] == held[:, :, None, :]).any(axis=3)
    return float(hits.mean())


class Uses(NamedTuple):
    """Of the distinct experts that a layer needs in one step, how many lie where; each float64 [samples]."""

    vram: np.ndarray
    ram: np.ndarray
    nvme: np.ndarray


@cache
def expected_uses(
    experts: int, k: int, vram_share: float, ram_share: float, skew: Skew, trace_steps: int = STEPS
) -> Uses:
    """Draws of a layer's uses at one token per step, from caches that hold these shares of all experts.

    The VRAM cache is asked first; what it lacks is looked for in RAM. Shares add to 1 or more if nothing is on NVMe.
    """
    trace, _ = synthetic_trace(trace_steps, LAYERS, experts, k, skew, np.random.default_rng(0))
    vram: Policy = Foresight(LAYERS, experts, round(vram_share * LAYERS * experts), margin=0.02)
    ram: Policy = Foresight(LAYERS, experts, round(min(1.0, ram_share) * LAYERS * experts))
    counts = []
    for step in trace:
        for layer, ids in enumerate(step):
            missed = vram.access(layer, ids).misses
            read = ram.access(layer, missed).misses.size if ram_share < 1 - vram_share else 0
            counts.append((k - missed.size, missed.size - read, read))
    kept = np.array(counts[int(WARM * len(counts)) :], np.float64)
    return Uses(kept[:, 0], kept[:, 1], kept[:, 2])


def recorded_uses(counts: np.ndarray, k: int, vram_slots: int, ram_slots: int, persistence: float) -> Uses:
    """As `expected_uses`, one sample per layer, if experts are chosen as `counts` [layers, experts] say they were.

    The hottest experts of all layers are on the card and the next ones in RAM, which is how both are filled. Of those
    that are on the drive the share `persistence` was read for the token before. What a cache that adapts gains
    beyond that is not counted. An expert has been used once more than was counted: few counts say little.
    """
    layers, experts = counts.shape
    chosen = k * (counts + 1) / (counts + 1).sum(axis=1, keepdims=True)
    rank = np.empty((layers, experts), np.int64)
    rank.flat[np.argsort(-counts.reshape(-1), kind="stable")] = np.arange(counts.size)
    vram, rest = (np.where(here, chosen, 0).sum(axis=1) for here in (rank < vram_slots, rank >= vram_slots + ram_slots))
    read = (1 - persistence) * rest
    return Uses(vram, k - vram - read, read)


def distinct_experts(experts: int, k: int, tokens: int) -> float:
    """How many experts `tokens` tokens of uniform routing touch in one layer."""
    return experts * (1 - (1 - k / experts) ** tokens) if experts else 0.0
