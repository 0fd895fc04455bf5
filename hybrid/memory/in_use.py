"""Who has which memory while a model runs, beside what the plan gave them: a few kinds, in bytes.

The plan's parts and what a process can know of itself are not cut alike, so both are put into the same kinds. `others`
are the system and other programs; what no kind has is free.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hybrid.memory import parts
from hybrid.memory.place import Placement

KINDS = ("experts", "weights", "kv", "program", "others")
# The plan's parts by kind; those that are not named belong to the program: its code, buffers and activations.
KIND_OF = {
    "experts": "experts",
    "expert slots": "experts",
    "attention": "weights",
    "shared experts and routers": "weights",
    "dense layers": "weights",
    "head": "weights",
    "norms": "weights",
    "embedding": "weights",
    "KV cache": "kv",
    "system": "others",
    "page cache": "others",
    "display and rounding": "others",
}


def planned_ram(placement: Placement, others: int) -> dict[str, int]:
    """What a program that was loaded by this plan is to have of RAM, beside the `others` as they are now.

    A plan that is made while the program runs counts what that has taken already among the system's.
    """
    own = parts.PROGRAM + (parts.CUDA_IN_RAM if placement.on_gpu else 0)
    found = Counter(by_kind(placement.ram.parts))
    found["program"] += own
    return dict(found) | {"others": others}


def by_kind(sizes: Mapping[str, int]) -> dict[str, int]:
    """A plan's parts, added up."""
    found: Counter[str] = Counter()
    for name, size in sizes.items():
        found[KIND_OF.get(name, "program")] += size
    return dict(found)


def real_ram(rss: int, *, experts: int, weights: int, kv: int) -> dict[str, int]:
    """What a process of `rss` bytes holds, given what its arrays take.

    Arrays mapped from files count as they are read, so together they may take more than the process has.
    """
    found, left = {}, rss
    for name, size in (("experts", experts), ("weights", weights), ("kv", kv)):
        found[name] = min(size, left)
        left -= found[name]
    return found | {"program": left}


def real_vram(reserved: int, allocated: int, *, experts: int, kv: int) -> dict[str, int]:
    """What torch holds on a card: the two large arrays, other tensors, and room that it keeps for more."""
    weights = max(0, allocated - experts - kv)
    return {"experts": experts, "weights": weights, "kv": kv, "program": max(0, reserved - experts - kv - weights)}


def area(size: int, plan: Mapping[str, int], real: Mapping[str, int]) -> dict[str, Any]:
    """The JSON form of one kind of memory; kinds in a fixed order, those of no bytes left out."""

    def in_order(sizes: Mapping[str, int]) -> dict[str, int]:
        return {kind: sizes[kind] for kind in KINDS if sizes.get(kind)}

    return {"size": size, "planned": in_order(plan), "real": in_order(real)}
