"""The memory plan: what a model will be on a machine, before anything is loaded. One pure function, `make_plan`.

Experts, if the choice is left to the plan ("auto"), are the first of these that fits:

    1. as released, in RAM and VRAM
    2. the most bits per weight from 3 down to 1.5, in steps of 0.05, all of them in RAM
    3. 1.5 bits in RAM and VRAM together
    4. 1.5 bits on a drive, RAM a cache
    5. fewer than 1.5 bits in RAM: poor answers, but answers

So more RAM never gives fewer bits. What else would be possible stands beside the plan with its price.
"""

import math
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from hybrid.config import ModelConfig
from hybrid.errors import UsageError
from hybrid.memory import parts
from hybrid.memory.hardware import Hardware
from hybrid.memory.kv_format import KINDS, REDUCED
from hybrid.memory.parts import Mix
from hybrid.memory.place import EXCLUSIVE, MIRRORED, NVME, Area, Options, Placement, place
from hybrid.memory.predict import Predicted, decode_speed, predict
from hybrid.memory.rates import Rates, rates
from hybrid.memory.simulate import EXPECTED, Skew
from quant import LADDER

POOR, LEAST_GOOD, MOST = LADDER[0], "trellis1_5", LADDER[-1]
GRID = [round(step / 20, 2) for step in range(60, 19, -1)]  # bits per weight of packs: 3 to 1
SHORTEST_CTX = 2048

__all__ = ["Area", "MemoryPlan", "Options", "Other", "choose", "commands", "make_plan"]


class Other(NamedTuple):
    """A plan that would also do: what is different, what it costs, and its figures."""

    change: str
    bpw: float
    tier: str
    on_gpu: bool
    ctx: int
    decode_tok_s: float
    ram_left: int
    cost: str


@dataclass(frozen=True)
class MemoryPlan:
    """Who lives where, in bytes. `nearest` are plans that fit where this one does not, `others` further choices."""

    config: ModelConfig
    options: Options
    placement: Placement
    rates: Rates
    predicted: Predicted | None  # None: it does not fit
    others: tuple[Other, ...] = ()
    nearest: tuple[Other, ...] = ()

    @property
    def fits(self) -> bool:
        return self.placement.fits

    @property
    def bpw(self) -> float:
        """Bits per weight of the routed experts."""
        return self.placement.mix.bits(self.config)

    @property
    def experts_bytes(self) -> int:
        return self.placement.mix.bytes(self.config)

    @property
    def routing(self) -> str:
        """What predictions take for the popularity of experts: "recorded" in earlier runs, or "assumed"."""
        return "recorded" if self.options.counts is not None and self.options.counts.any() else "assumed"

    def as_dict(self) -> dict[str, Any]:
        """The JSON form; sizes in bytes, speeds in tokens per second, times in seconds."""
        placement = self.placement
        return {
            "fits": self.fits,
            "experts": {
                "bpw": round(self.bpw, 4),
                "bytes": self.experts_bytes,
                "formats": placement.mix.names(),
                "count": self.config.num_experts,
                "tier": placement.tier,
                "exclusive": placement.exclusive,
                "vram_slots": placement.vram_slots,
                "ram_slots": placement.ram_slots,
            },
            "vram": _area(placement.vram),
            "ram": _area(placement.ram),
            "nvme": _area(placement.nvme),
            "predicted": _predicted(self.predicted),
            "routing": self.routing,
            "resident": placement.resident,
            "kv": self.options.kv,
            "ctx": self.options.ctx,
            "batch": self.options.batch,
            "prefill_chunk": placement.prefill_chunk,
            "on_gpu": placement.on_gpu,
            "lacks": placement.lacks,
            "notes": list(placement.notes),
            "rates": asdict(self.rates),
            "alternatives": [other._asdict() for other in self.others],
            "nearest": [other._asdict() for other in self.nearest],
        }


def _area(area: Area) -> dict[str, Any]:
    return {"total": area.total, "parts": dict(area.parts), "size": area.size, "left": area.left}


def _predicted(predicted: Predicted | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, figure in (predicted._asdict() if predicted else dict.fromkeys(Predicted._fields)).items():
        values = (figure.value, figure.low, figure.high) if figure else (None, None, None)
        for suffix, value in zip(("", "_low", "_high"), values, strict=True):
            found[name + suffix] = None if value is None else float(f"{value:.4g}")
        found[f"{name}_limit"] = figure.limit if figure else None
    return found


def make_plan(
    config: ModelConfig,
    hardware: Hardware,
    options: Options,
    trace_skew: Skew = EXPECTED,
    speeds: Rates | None = None,
) -> MemoryPlan:
    """Plan `config` on `hardware`; reads and measures nothing. `speeds` default to the nominal ones of `hardware`.

    Raises UsageError for options that contradict the model: a longer context than it has, bits that no format has.
    """
    _check(config, options)
    speeds = speeds or rates(hardware)
    placement = choose(config, hardware, options)
    predicted = predict(config, options, placement, speeds, trace_skew) if placement.fits else None
    plan = MemoryPlan(config, options, placement, speeds, predicted)
    others = (_other(plan, variant, choose(config, hardware, variant), trace_skew) for variant in _variants(plan))
    return replace(plan, others=_distinct(others)) if plan.fits else replace(plan, nearest=_distinct(others))


def _check(config: ModelConfig, options: Options) -> None:
    if not 1 <= options.ctx <= config.max_position_embeddings:
        raise UsageError(
            f"A context of {options.ctx:,} tokens is not possible.",
            f"This model takes up to {config.max_position_embeddings:,}.",
        )
    if options.batch < 1:
        raise UsageError(f"A batch of {options.batch} is none.", "Give 1 or more.")
    if options.resident not in ("auto", *parts.RESIDENT_BITS) or options.kv not in KINDS:
        raise UsageError(f"{options.resident} residents with {options.kv} KV is no choice.", "See --help.")


# -- which experts ----------------------------------------------------------------------------------------------------
def choose(config: ModelConfig, hardware: Hardware, options: Options) -> Placement:
    """The best placement for `options`; if none fits, the one that lacks least."""
    if options.stored is not None or options.experts != "auto" or not _can_be_packed(config):
        return place(config, hardware, options, _asked(config, options))
    tried = []
    for mix, tiers in _preferences(config):
        found = place(config, hardware, replace(options, nvme=options.nvme and NVME in tiers), mix)
        if found.fits and found.tier in tiers:
            return found
        tried.append(found)
    return min((found for found in tried if not found.fits), key=lambda found: found.lacks)


def _preferences(config: ModelConfig) -> Iterator[tuple[Mix, tuple[str, ...]]]:
    """Experts in the order they are wanted, and where they may live."""
    mixes = [parts.uniform(config, MOST), *_mixes(config)]
    good = [mix for mix in mixes if (POOR, POOR) not in mix.counts]
    least = parts.uniform(config, LEAST_GOOD)
    yield parts.native(config), (MIRRORED, EXCLUSIVE)
    yield from ((mix, (MIRRORED,)) for mix in [*good, least])
    yield from ((least, (tier,)) for tier in (EXCLUSIVE, NVME))
    yield from ((mix, (MIRRORED, EXCLUSIVE)) for mix in [*mixes[len(good) :], parts.uniform(config, POOR)])


def _mixes(config: ModelConfig) -> Iterator[Mix]:
    least = parts.uniform(config, POOR).bits(config)
    return (parts.of_bits(config, bits) for bits in GRID if bits >= least)


def _can_be_packed(config: ModelConfig) -> bool:
    return config.num_experts > 0 and config.hidden_size % 32 == 0 and config.moe_intermediate_size % 32 == 0


def _asked(config: ModelConfig, options: Options) -> Mix:
    """The experts that `options` name. Raises UsageError."""
    name = options.experts
    if options.stored is not None:
        return options.stored
    if name in ("native", "auto"):
        return parts.native(config)
    if name in (*LADDER, "int4_g32"):
        return parts.uniform(config, name)
    try:
        return parts.of_bits(config, float(name))
    except ValueError:
        known = ", ".join((*LADDER, "int4_g32"))
        remedy = f"Write auto, native, bits per weight such as 1.9, or one of {known}."
        raise UsageError(f"{name!r} is no format of experts.", remedy) from None


# -- what else would do -----------------------------------------------------------------------------------------------
def _variants(plan: MemoryPlan) -> Iterator[Options]:
    """Options near those of `plan`: other bits if it fits, whatever takes less if it does not or misses the card."""
    options = plan.options
    if plan.fits and options.stored is None and _can_be_packed(plan.config):
        yield from (
            replace(options, experts=name) for name in ("native", *reversed(LADDER[LADDER.index(LEAST_GOOD) :]))
        )
    if plan.fits and not plan.placement.notes:
        return
    auto = options.experts if options.stored is not None else "auto"
    shorter = [options.ctx >> halvings for halvings in range(1, 20) if options.ctx >> halvings >= SHORTEST_CTX]
    smaller = options.kv if options.kv in REDUCED else "fp8"
    yield from (replace(options, kv=smaller), replace(options, experts=auto), replace(options, nvme=True))
    yield from (replace(options, ctx=ctx) for ctx in shorter)
    coarser = () if options.as_stored else ("int8", "int4")  # codes are not coded anew
    yield from (replace(options, resident=choice) for choice in coarser)
    least = replace(options, ctx=min(options.ctx, SHORTEST_CTX), batch=1, kv=smaller, experts=auto, nvme=True)
    yield from (replace(least, ctx=options.ctx), least)
    yield from (replace(least, resident=choice) for choice in coarser[-1:])


def _distinct(others: Iterable[Other | None]) -> tuple[Other, ...]:
    """The first of each kind: of contexts that fit that is the longest."""
    found: dict[tuple[Any, ...], Other] = {}
    for other in others:
        if other is not None:
            found.setdefault((other.tier, round(other.bpw, 2), "--kv" in other.change, other.on_gpu), other)
    return tuple(found.values())


def _other(plan: MemoryPlan, options: Options, placement: Placement, skew: Skew) -> Other | None:
    """`placement` as an alternative to `plan`; None if it does not fit or is the same."""
    bpw, now = placement.mix.bits(plan.config), plan.placement
    is_same = plan.fits and (now.tier, now.on_gpu) == (placement.tier, placement.on_gpu) and abs(bpw - plan.bpw) < 0.05
    if not placement.fits or is_same:
        return None
    speed = decode_speed(plan.config, options, placement, plan.rates, skew)
    changes = ", ".join(_changes(plan, options, placement))
    cost = ", ".join(_costs(plan, options, bpw, speed)) or "nothing else"
    return Other(
        changes, round(bpw, 4), placement.tier, placement.on_gpu, options.ctx, round(speed, 2), placement.ram.left, cost
    )


def _changes(plan: MemoryPlan, options: Options, placement: Placement) -> Iterator[str]:
    for name in ("ctx", "kv", "batch", "resident", "experts"):
        if getattr(options, name) != getattr(plan.options, name):
            yield f"--{name} {getattr(options, name)}"
    if placement.tier == NVME != plan.placement.tier:
        yield "experts on NVMe"
    if placement.on_gpu and not plan.placement.on_gpu:
        yield "the card in use"


def _costs(plan: MemoryPlan, options: Options, bpw: float, speed: float) -> Iterator[str]:
    if abs(bpw - plan.bpw) >= 0.005:
        yield f"{bpw:.2f} bits per weight instead of {plan.bpw:.2f}"
    if options.ctx < plan.options.ctx:
        yield f"{plan.options.ctx - options.ctx:,} tokens less context"
    if options.kv != plan.options.kv:
        yield "a coarser KV cache"
    if plan.predicted:
        yield f"{speed / plan.predicted.decode_tok_s.value:.2f} times the speed"


# -- the commands -----------------------------------------------------------------------------------------------------
def commands(plan: MemoryPlan, model: str) -> list[str]:
    """What to type to get this plan of `model`: a pack, where it takes one, then a conversation.

    A plan that fills RAM is held to its numbers: what is free when the model is loaded may be another amount.
    """
    placement, lines, run = plan.placement, [], shlex.quote(model)
    resident = "bf16" if plan.options.as_stored else placement.resident  # to quantize, bf16 is as it is stored
    as_released = placement.mix == parts.native(plan.config) and resident == "bf16" and placement.tier != NVME
    if plan.options.stored is None and not as_released:
        pack = shlex.quote(f"{model}-pack")
        lines.append(f"kimi-local quantize {run} {pack} {_formats(plan)} --resident {resident}")
        run = pack
    numbers = "" if placement.tier == MIRRORED else f" --ram-budget {max(1, placement.expert_bytes)}"
    if placement.exclusive or plan.options.gpu_experts is not None:
        numbers += f" --gpu-experts {placement.vram_slots}"
    rows = f" --kv {plan.options.kv}" if plan.options.kv in REDUCED else ""
    return [*lines, f"kimi-local chat {run} --ctx {plan.options.ctx}{rows}{numbers}"]


def _formats(plan: MemoryPlan) -> str:
    """What tells `quantize` the plan's experts."""
    names = list(plan.placement.mix.names())
    if names == ["int4_g32"]:
        return "--format int4"
    return f"--mix {names[0]}" if len(names) == 1 else f"--bits {math.ceil(plan.bpw * 100 - 1e-6) / 100:g}"
