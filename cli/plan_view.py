"""A plan for people: the answer in five lines, then every part, the predictions, the choices and the commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cli.output import byte_count, count, duration, print_table, short_tokens

if TYPE_CHECKING:
    from hybrid.memory.achieved import Compared
    from hybrid.memory.plan import Area, MemoryPlan, Other
    from hybrid.memory.predict import Figure

GIB = 1 << 30
TIERS = {
    "mirrored": "all in RAM",
    "exclusive": "RAM and VRAM together hold them, each in one place",
    "nvme": "on NVMe, RAM a cache",
}
ROUTING = {
    "recorded": "as often as earlier runs chose each expert",
    "assumed": "assumed: no run of this model is recorded",
}
UNITS = {"rss": "bytes", "vram": "bytes", "load_s": "seconds"}


class Lines(NamedTuple):
    """Commands: what to type to run the plan, and to see it again."""

    run: list[str]
    again: str


def size(number: float) -> str:
    """'236.3 GiB (253.7 GB)'."""
    return f"{number / GIB:,.1f} GiB ({number / 1e9:,.1f} GB)"


def show(name: str, plan: MemoryPlan, lines: Lines, compared: Sequence[Compared]) -> None:
    """Print everything on standard output."""
    for line in head(name, plan):
        print(line)
    _table("Where every byte lives", [("", "GiB", "GB"), *_parts(plan)])
    if plan.predicted:
        _table("Predicted", _predictions(plan))
    for title, others in (("Also possible", plan.others), ("What would fit", plan.nearest)):
        if others:
            _table(title, [("change", "tok/s", "RAM left", "cost"), *map(_other, others)])
    for note in plan.placement.notes:
        print(f"\nNote: {note}")
    if compared:
        _table("Predicted and achieved", [("", "predicted", "achieved", "ratio"), *map(_compared, compared)])
    for line in lines.run:
        print(f"\nRun:   {line}" if line == lines.run[0] else f"       {line}")
    print(f"\nAgain: {lines.again}")


def head(name: str, plan: MemoryPlan) -> list[str]:
    """The first five lines: fits or not, the experts, where things live (two), what is left."""
    placement, options = plan.placement, plan.options
    verdict = "fits" if plan.fits else f"does not fit: {size(placement.lacks)} of RAM are missing"
    sequences = f"{count(options.batch)} x " if options.batch > 1 else ""
    return [
        f"{name} {verdict}. Context {sequences}{short_tokens(options.ctx)}, KV cache {options.kv}.",
        f"Experts  {_experts(plan)}",
        f"VRAM     {_where(placement.vram, plan.placement.on_gpu, placement.resident)}",
        f"RAM      {_where(placement.ram, not plan.placement.on_gpu, placement.resident)}{_drive(plan)}",
        f"Left     VRAM {size(placement.vram.left)}, RAM {size(placement.ram.left)}",
    ]


def _experts(plan: MemoryPlan) -> str:
    if not plan.config.num_experts:
        return "none: a dense model"
    names = plan.placement.mix.names().items()
    formats = ", ".join(name if len(names) == 1 else f"{count(number)} {name}" for name, number in names)
    return f"{plan.bpw:.2f} bits per weight, {size(plan.experts_bytes)}: {formats}; {TIERS[plan.placement.tier]}"


def _where(area: Area, holds_resident: bool, resident: str) -> str:
    """The four largest parts and how much the rest takes."""
    if not area.parts:
        return "not used" if area.size else "none"
    parts = dict(area.parts)
    names = ("attention", "shared experts and routers", "dense layers", "head", "norms")
    if holds_resident:
        parts = {f"resident {resident}": sum(parts.pop(name, 0) for name in names), **parts}
    largest = sorted(parts.items(), key=lambda part: -part[1])[:4]
    rest = area.total - sum(bytes for _, bytes in largest)
    shown = ", ".join(f"{name} {bytes / GIB:,.1f}" for name, bytes in largest)
    return f"{area.total / GIB:,.1f} of {area.size / GIB:,.1f} GiB: {shown}, other {rest / GIB:,.1f}"


def _drive(plan: MemoryPlan) -> str:
    placement, experts = plan.placement, plan.config.num_experts
    if not placement.nvme.total:
        return ""
    on_card = f", {placement.vram_slots / experts:.0%} on the card" if placement.vram_slots else ""
    return f"; NVMe {size(placement.nvme.total)}, {placement.ram_slots / experts:.0%} cached{on_card}"


def _parts(plan: MemoryPlan) -> Iterable[tuple[str, str, str]]:
    placement = plan.placement
    slots = {"VRAM": placement.vram_slots, "RAM": placement.ram_slots}
    for kind, area in (("VRAM", placement.vram), ("RAM", placement.ram), ("NVMe", placement.nvme)):
        for name, bytes in area.parts.items():
            number = f", {count(slots[kind])} experts" if name == "expert slots" else ""
            yield f"{kind} {name}{number}", f"{bytes / GIB:,.2f}", f"{bytes / 1e9:,.2f}"
        if area.parts:
            yield f"{kind} total", f"{area.total / GIB:,.2f}", f"{area.total / 1e9:,.2f}"


def _predictions(plan: MemoryPlan) -> Iterable[tuple[str, ...]]:
    assert plan.predicted is not None
    chunk = f"prefill, chunks of {count(plan.placement.prefill_chunk)}"
    for name, figure, unit in zip(("decode", chunk, "load"), plan.predicted, (" tok/s", " tok/s", ""), strict=True):
        yield name, *_figure(figure, unit), f"limited by {figure.limit}"
    sources = ", ".join(f"{name} {source}" for name, source in plan.rates.sources.items())
    speeds = f"{plan.rates.cores} cores, RAM {plan.rates.ram:.3g} GB/s, drive {plan.rates.disk:.3g} GB/s"
    yield "with", speeds, "", sources
    if plan.config.num_experts:
        yield "routing", ROUTING[plan.routing]


def _figure(figure: Figure, unit: str) -> tuple[str, str]:
    def spelt(value: float) -> str:
        return f"{value:.3g}" if unit else duration(value)

    return f"{spelt(figure.value)}{unit}", f"{spelt(figure.low)} to {spelt(figure.high)}"


def _other(other: Other) -> tuple[str, ...]:
    return other.change, f"{other.decode_tok_s:.3g}", f"{other.ram_left / GIB:,.1f} GiB", other.cost


def _compared(row: Compared) -> tuple[str, ...]:
    spelt = byte_count if UNITS.get(row.name) == "bytes" else "{:.4g}".format
    return row.name, spelt(row.predicted), spelt(row.achieved), f"{row.ratio:.2f}"


def _table(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    print()
    print_table(title, rows, wide=True)
