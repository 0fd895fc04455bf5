"""Where every byte lives: one set of experts on one machine, placed or found not to fit. Pure arithmetic.

Resident weights, KV cache and prefill go to the card if it holds them all, else to RAM; what is left of the card are
slots for hot experts. All experts are in RAM if they fit there (slots then hold copies, which change with the text).
If not, slots and RAM add up: an expert on the card stays there and is nowhere else. Where even that is too little, RAM
is slots too and a drive has the rest.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from hybrid.config import ModelConfig
from hybrid.memory import parts
from hybrid.memory.hardware import Hardware
from hybrid.memory.parts import Mix, Resident

CHUNKS = (8192, 4096, 2048, 1024, 512, 256, 128)  # tokens of a prefill chunk on a card, the best first
MIRRORED, EXCLUSIVE, NVME = "mirrored", "exclusive", "nvme"


@dataclass(frozen=True)
class Options:
    """What a plan is asked for. `experts`: "auto", "native", a format's name, or bits per weight such as "1.9"."""

    ctx: int = 32768  # tokens of each of `batch` sequences
    batch: int = 1
    experts: str = "auto"
    resident: str = "auto"  # auto | bf16 | int8 | int4; auto is bf16 where the card holds it or experts are native
    kv: str = "bf16"  # fp32 | bf16 | fp8 | int8
    reserve: int | None = None  # bytes of RAM left to the system; None: see `system_bytes`
    nvme: bool = True  # whether experts may stay on a drive
    ram_budget: int | None = None  # bytes of RAM for experts; None: what is left
    gpu_experts: int | None = None  # the most that go to the card; None: what there is room for
    running: bool = False  # the program is up: what it has taken itself is `reserve`d already
    stored: Mix | None = None  # a pack's experts, which decide `experts`
    stored_resident: str = "bf16"  # what most of the model's resident weights are kept in
    stored_weights: Resident | None = None  # what they take, if some are kept as codes
    # How often each expert was chosen, int64 [layers, experts]: it moves predictions and no byte.
    counts: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def as_stored(self) -> bool:
        """Whether resident weights are what the model's files hold."""
        return self.resident == "auto" and (self.stored is not None or self.stored_weights is not None)

    def weights(self, config: ModelConfig, choice: str) -> Resident:
        """Bytes of the resident weights if they are kept as `choice`."""
        own = self.stored_weights if self.as_stored else None
        return own or parts.resident(config, choice)


class Area(NamedTuple):
    """One kind of memory: its size in bytes, and what lies there."""

    size: int
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def left(self) -> int:
        return self.size - self.total


@dataclass(frozen=True)
class Placement:
    """One way to place a model. If `lacks` is not 0, RAM is short of so many bytes and nothing fits."""

    mix: Mix
    on_gpu: bool  # resident weights, KV cache, prefill
    resident: str
    weights: Resident
    tier: str  # MIRRORED, EXCLUSIVE or NVME
    vram: Area
    ram: Area
    nvme: Area
    vram_slots: int  # experts
    ram_slots: int  # experts in RAM: all, or the slots of a cache
    prefill_chunk: int
    lacks: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        return not self.lacks

    @property
    def exclusive(self) -> bool:
        """Whether experts on the card are not in RAM as well; those stay where they are."""
        return self.tier != MIRRORED and self.vram_slots > 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of RAM that experts take; of slots, where it is slots."""
        return self.ram.parts.get("experts", 0) + self.ram.parts.get("expert slots", 0)


def system_bytes(hardware: Hardware, options: Options) -> int:
    """RAM that is not ours: what the system keeps, or what other programs hold now if that is more."""
    if options.reserve is not None:
        return options.reserve
    usual = parts.SYSTEM + int(hardware.ram_total * parts.SYSTEM_SHARE)
    taken = hardware.ram_total - hardware.ram_available if hardware.ram_available else 0
    return min(hardware.ram_total, max(usual, taken))


def place(config: ModelConfig, hardware: Hardware, options: Options, mix: Mix) -> Placement:
    """Place `mix`, on the card if it holds what must be there."""
    largest = mix.largest(config)
    if hardware.gpus:
        for choice in _residents(options, mix, on_gpu=True):
            card = _card_parts(config, hardware, options, choice)
            chunk = _chunk(config, options, largest, hardware.gpus[0].memory_total - sum(card.values()))
            if chunk:
                prefill = parts.gpu_prefill_bytes(config, chunk, largest)
                return _on_gpu(config, hardware, options, mix, choice, card | prefill, chunk)
    notes = ("The card does not hold the resident weights and the KV cache; it is not used.",) if hardware.gpus else ()
    choice = next(_residents(options, mix, on_gpu=False))
    chunk = min(parts.CPU_CHUNK, options.ctx)
    weights = options.weights(config, choice)
    fixed = _host_parts(config, hardware, options, weights) | weights.parts(config)
    fixed |= {"KV cache": parts.kv_bytes(config, options.ctx, options.batch, options.kv)}
    fixed |= parts.decoded_bytes(config, options.ctx, options.kv, choice, on_gpu=False)
    fixed |= {"prefill activations": parts.cpu_prefill_bytes(config, chunk)}
    unused = Area(hardware.gpus[0].memory_total if hardware.gpus else 0, {})
    return _in_ram(config, options, Placement(
        mix, False, choice, weights, MIRRORED, unused, Area(hardware.ram_total, fixed), Area(0, {}), 0, 0, chunk,
        notes=notes,
    ))  # fmt: skip


def _residents(options: Options, mix: Mix, *, on_gpu: bool) -> Iterator[str]:
    """Choices of resident weights in the order they are tried."""
    if options.as_stored:
        yield options.stored_resident
    elif options.resident != "auto":
        yield options.resident
    elif on_gpu:
        yield from ("bf16", "int8")
    else:
        is_native = all(pair[0] in ("int4_g32", "bf16") for pair in mix.counts)
        yield "bf16" if is_native else "int8"


def _card_parts(config: ModelConfig, hardware: Hardware, options: Options, choice: str) -> dict[str, int]:
    resident, size = options.weights(config, choice), hardware.gpus[0].memory_total
    tied = {"head": resident.embedding} if config.tie_word_embeddings else {}
    return {
        "CUDA context": parts.CUDA_CONTEXT,
        "display and rounding": int(size * parts.DISPLAY_SHARE),
        **resident.parts(config),
        **tied,
        "KV cache": parts.kv_bytes(config, options.ctx, options.batch, options.kv),
        **parts.decoded_bytes(config, options.ctx, options.kv, choice, on_gpu=True),
        "workspace": parts.CUBLAS + parts.decode_bytes(config, options.batch),
    }


def _chunk(config: ModelConfig, options: Options, largest: int, left: int) -> int:
    """The largest prefill chunk that leaves experts half of what the card has left, or the smallest that fits, or 0."""
    wanted = [chunk for chunk in CHUNKS if chunk <= max(options.ctx, CHUNKS[-1])]
    needs = [(chunk, sum(parts.gpu_prefill_bytes(config, chunk, largest).values())) for chunk in wanted]
    roomy = [chunk for chunk, need in needs if need <= left / 2]
    return roomy[0] if roomy else next((chunk for chunk, need in reversed(needs) if need <= left), 0)


def _host_parts(config: ModelConfig, hardware: Hardware, options: Options, weights: Resident) -> dict[str, int]:
    program = {} if options.running else {"program": parts.PROGRAM}
    return {
        "system": system_bytes(hardware, options),
        **program,
        "embedding": weights.embedding,
        "workspace": parts.decode_bytes(config, options.batch),
    }


def _on_gpu(
    config: ModelConfig,
    hardware: Hardware,
    options: Options,
    mix: Mix,
    choice: str,
    card: dict[str, int],
    chunk: int,
) -> Placement:
    size, largest = hardware.gpus[0].memory_total, mix.largest(config)
    slots = min(config.num_experts, (size - sum(card.values())) // largest) if largest else 0
    slots = slots if options.gpu_experts is None else min(slots, options.gpu_experts)
    vram = Area(size, card | ({"expert slots": slots * largest} if slots else {}))
    staging = 2 * min(parts.STAGED_EXPERTS, config.n_routed_experts) * largest
    weights = options.weights(config, choice)
    fixed = _host_parts(config, hardware, options, weights)
    fixed |= {} if options.running else {"CUDA in the process": parts.CUDA_IN_RAM}
    fixed |= {"pinned staging": staging} if staging else {}
    return _in_ram(config, options, Placement(
        mix, True, choice, weights, MIRRORED, vram, Area(hardware.ram_total, fixed), Area(0, {}), slots, 0, chunk
    ))  # fmt: skip


def _in_ram(config: ModelConfig, options: Options, begun: Placement) -> Placement:
    """`begun`, whose RAM holds only what is fixed, with a home for all experts."""
    size, slots, room = begun.mix.bytes(config), begun.vram_slots, begun.ram.left
    if options.ram_budget is not None and options.ram_budget < size:
        if options.ram_budget > room:
            return _lacking(begun, options.ram_budget - room)
        room = options.ram_budget
    if size <= room:
        return _placed(begun, MIRRORED, size, config.num_experts)
    # Who is in slots is decided when they are filled; that they are the smallest is the careful guess.
    rest = size - begun.mix.least(config, slots)
    if slots and rest <= room:
        return _placed(begun, EXCLUSIVE, rest, config.num_experts - slots)
    return _on_nvme(config, options, begun, room) if options.nvme and size else _lacking(begun, rest - room)


def _on_nvme(config: ModelConfig, options: Options, begun: Placement, room: int) -> Placement:
    """All experts on the drive, and as many as possible in `room` bytes of RAM, cut into slots."""
    largest, size, fixed = begun.mix.largest(config), begun.mix.bytes(config), dict(begun.ram.parts)
    if options.ram_budget is None:
        free = begun.ram.size - fixed["system"]
        fixed["page cache"] = free // parts.SPARE if options.running else parts.PAGE_CACHE
        room -= fixed["page cache"]
    slots = min(config.num_experts - begun.vram_slots, room // largest)
    if slots < config.num_experts_per_tok:  # a token needs so many at once
        return _lacking(begun, config.num_experts_per_tok * largest - room)
    ram = Area(begun.ram.size, {**fixed, "expert slots": slots * largest})
    return replace(begun, tier=NVME, ram=ram, nvme=Area(size, {"experts": size}), ram_slots=slots)


def _placed(begun: Placement, tier: str, experts: int, count: int) -> Placement:
    added = {"experts": experts} if experts else {}
    return replace(begun, tier=tier, ram=Area(begun.ram.size, {**begun.ram.parts, **added}), ram_slots=count)


def _lacking(begun: Placement, lacks: int) -> Placement:
    return replace(begun, lacks=max(1, lacks))
