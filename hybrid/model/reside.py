"""Where a model's weights will live: on a card, in RAM, or on the drive. The plan says so, and here it is obeyed.

On a card if its kernels compute what they should and the plan has it in use. What it does not get is said in one line,
as a warning, and done by the CPU. Of a card that is really there, nothing here was run.
"""

import logging
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

from hybrid.checkpoint import Checkpoint, Pack
from hybrid.config import ModelConfig
from hybrid.errors import DoesNotFit, UsageError
from hybrid.memory import parts
from hybrid.memory.expert_cache import ExpertCache
from hybrid.memory.expert_store import stored_experts
from hybrid.memory.hardware import Hardware, probe
from hybrid.memory.known import Known, of_checkpoint, options_for
from hybrid.memory.kv_format import AUTO, kind_of
from hybrid.memory.place import NVME, Options, Placement
from hybrid.memory.plan import choose
from hybrid.memory.tiers import NvmeTier, OnBytes, hottest, require_room
from hybrid.model.gpu import find_card, first_line
from hybrid.model.transformer import Residence, Transformer

CPU, GIB = torch.device("cpu"), 1 << 30
BUFFERS = ("workspace", "prefill activations", "pinned staging", "decoded rows")  # the plan's parts that are no weights

log = logging.getLogger(__name__)


def reside(device: torch.device, dtype: torch.dtype, exact: bool, threads: int, kv: str = AUTO) -> Residence:
    """`device`, with our kernels if they work there; the CPU if they do not.

    Without Triton, in float32 and for `exact` experts a card computes by torch's own products.
    """
    ours = dtype == torch.bfloat16 and not exact
    card, reason = find_card(device) if ours else (None, "")
    if reason:
        log.warning(reason)
    if reason and find_spec("triton") is not None:
        device = CPU  # it computes something else, or nothing: not to be trusted with anything
    return Residence(device, dtype, exact, threads, card, kv=kv)


# -- the plan ---------------------------------------------------------------------------------------------------------
def settle(
    checkpoint: Checkpoint,
    residence: Residence,
    tokens: int,
    *,
    ram_budget: int | None = None,
    gpu_experts: int | None = None,
) -> tuple[Residence, Placement]:
    """The plan by which `checkpoint` is loaded, with a KV cache of `tokens` tokens and what is free now; and
    `residence`, or the CPU if the plan has no use for the card. `ram_budget` and `gpu_experts` as `Options` has them.

    Raises, before a weight is read, UsageError for what is not there to be used and DoesNotFit, with the sizes.
    """
    if gpu_experts and residence.card is None:
        raise UsageError("No expert can be kept on a card here: there is none in use.", "Leave out --gpu-experts.")
    is_pack = isinstance(checkpoint, Pack) and not residence.exact
    if ram_budget is not None and not is_pack:
        raise UsageError("Only packs, with int8 activations, run with a RAM budget.", "Make one: kimi-local quantize.")
    found, hardware = of_checkpoint(checkpoint), machine(residence)
    mix = found.stored or parts.native(found.config)
    no_slots = residence.card is None or ("bf16", "bf16") in mix.counts  # which no kernel of ours multiplies
    options = options_for(
        found,
        hardware,
        running=True,
        ctx=tokens,
        resident=_kept_as(found, residence),
        kv=kind_of(residence.kv, full=residence.dtype == torch.float32),
        nvme=is_pack,
        ram_budget=ram_budget,
        gpu_experts=0 if no_slots else gpu_experts,
    )
    placement = choose(found.config, hardware, options)
    if hardware.gpus and not placement.on_gpu:
        log.warning(placement.notes[0])
        return settle(checkpoint, replace(residence, device=CPU, card=None), tokens, ram_budget=ram_budget)
    if not placement.fits:
        _refuse(placement, options, found.config)
    return residence, placement


def machine(residence: Residence) -> Hardware:
    """This machine as it is now, with the card that `residence` uses and what is free on it, or with none."""
    hardware = probe()
    if residence.device.type == "cpu" and residence.card is None:
        return replace(hardware, gpus=())
    card = hardware.gpus[residence.device.index or 0]
    room = min(card.memory_total, card.memory_free + parts.CUDA_CONTEXT)  # what is free is so beside our own context
    return replace(hardware, gpus=(card._replace(memory_total=room),))


def _kept_as(found: Known, residence: Residence) -> str:
    """What resident weights are kept in, as `Options` says it; only our own kernels read codes."""
    if residence.dtype == torch.float32:
        return "fp32"
    return "auto" if found.stored_weights is not None and _ours(residence) else "bf16"


def _ours(residence: Residence) -> bool:
    return (residence.device.type == "cpu" or residence.card is not None) and not residence.exact


def _refuse(placement: Placement, options: Options, config: ModelConfig) -> None:
    """Raise DoesNotFit with the sizes that matter."""
    if options.ram_budget is not None:
        require_room(options.ram_budget, placement.mix.largest(config), config.num_experts_per_tok)
    ram = dict(placement.ram.parts)
    free = placement.ram.size - ram.pop("system")
    needed, cache = free + placement.lacks, ram.pop("KV cache", 0)
    sizes = {
        "routed experts": needed - cache - sum(ram.values()),
        "buffers": sum(ram.pop(name, 0) for name in BUFFERS),
        "resident weights": sum(ram.values()),
        "KV cache": cache,
    }
    spelt = ", ".join(f"{name} {size / GIB:,.1f} GiB" for name, size in sizes.items() if size)
    least = "at least " if options.nvme else ""
    raise DoesNotFit(
        f"This model needs {least}{needed / GIB:,.1f} GiB of memory ({spelt}; {options.ctx:,} tokens of context) and "
        f"{free / GIB:,.1f} GiB are free.",
        "Nothing was read. Use a smaller --ctx or --ram-budget, a smaller model, or a machine with more memory.",
    )


# -- obeying it -------------------------------------------------------------------------------------------------------
def load_bytes(checkpoint: Checkpoint, residence: Residence, placement: Placement) -> int:
    """Bytes that `Transformer` will read: resident weights as headers tell, and the plan's experts in RAM."""
    resident = checkpoint.load_bytes(residence.dtype.itemsize, packed=_ours(residence))["resident"]
    return resident + (placement.expert_bytes if placement.tier != NVME else 0)


def furnish(checkpoint: Checkpoint, residence: Residence, placement: Placement, counts: np.ndarray) -> Residence:
    """`residence` with what the plan says of experts: which ones, those of the highest `counts` [layers, experts], only
    the card is to have, and the tier of those on the drive."""
    pinned = None
    if placement.exclusive:
        pinned = np.zeros(counts.shape, bool)
        pinned.flat[hottest(counts, checkpoint.config.moe_layers)[: placement.vram_slots]] = True
    if placement.tier != NVME:
        return replace(residence, pinned=pinned)
    assert isinstance(checkpoint, Pack)
    keys = [] if pinned is None else np.flatnonzero(pinned).tolist()
    tier = NvmeTier(checkpoint, placement.expert_bytes, pinned=keys, many=residence.many)
    return replace(residence, pinned=pinned, tier=tier)


def fill_card(
    model: Transformer,
    checkpoint: Checkpoint,
    placement: Placement,
    pinned: np.ndarray | None,
    counts: np.ndarray,
    on_bytes: OnBytes,
) -> None:
    """Take the plan's slots for experts on the model's card, and fill them: for good with those `pinned` bool [layers,
    experts], else with copies of those of the highest `counts`.

    Where copies have no room, a warning says so. Raises DoesNotFit where pinned ones have none, KimiError if copying an
    expert fails.
    """
    if not placement.vram_slots or model.card is None:
        return
    size = placement.mix.largest(model.config)
    try:
        cache = ExpertCache(model.config, placement.vram_slots, size, model.card.device)
    except RuntimeError as error:
        if pinned is not None:
            reason = f"The card has no room for {placement.vram_slots:,} experts: {first_line(error)}"
            raise DoesNotFit(reason, "Use a smaller --gpu-experts.") from error
        log.warning("No experts are kept on the card: %s", first_line(error))
        return
    if pinned is None:
        model.keep_hot(cache)
        cache.fill(counts, on_bytes)
    else:
        model.keep_hot(cache, partial(stored_experts, checkpoint))
        cache.pin(np.flatnonzero(pinned).tolist(), on_bytes)
