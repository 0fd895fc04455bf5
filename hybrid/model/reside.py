"""Where a model's weights will live: on a card, in RAM, or on the drive.

On a card whose kernels compute what they should and whose memory, by the plan's arithmetic, holds them. What it does
not get is said in one line, as a warning, and done by the CPU. Of a card that is really there, nothing here was run.
"""

import logging
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch

from hybrid.checkpoint import Checkpoint, Pack
from hybrid.errors import DoesNotFit, UsageError
from hybrid.memory import parts
from hybrid.memory.expert_cache import ExpertCache
from hybrid.memory.expert_store import PackedExperts
from hybrid.memory.hardware import Hardware, available_ram, probe
from hybrid.memory.known import known
from hybrid.memory.place import Options, Placement, place
from hybrid.memory.tiers import NvmeTier, OnBytes
from hybrid.model.gpu import find_card, first_line
from hybrid.model.moe import MoE
from hybrid.model.transformer import Residence, Transformer

CPU, GIB = torch.device("cpu"), 1 << 30
SPARE = 16  # of the free memory, one part in so many is left free where experts take what they can get

log = logging.getLogger(__name__)


def reside(device: torch.device, dtype: torch.dtype, exact: bool, threads: int) -> Residence:
    """`device`, with our kernels if they work there; the CPU if they do not.

    Without Triton, in float32 and for `exact` experts a card computes by torch's own products.
    """
    ours = dtype == torch.bfloat16 and not exact
    card, reason = find_card(device) if ours else (None, "")
    if reason:
        log.warning(reason)
    if reason and find_spec("triton") is not None:
        device = CPU  # it computes something else, or nothing: not to be trusted with anything
    return Residence(device, dtype, exact, threads, card)


def fit(checkpoint: Checkpoint, residence: Residence, tokens: int, gpu_experts: int | None) -> tuple[Residence, int]:
    """`residence`, or the CPU if the card does not hold the resident weights and a KV cache of `tokens` tokens; and how
    many experts get slots beside them: `gpu_experts`, or as many as the plan says.

    Raises UsageError for slots without a card to have them on.
    """
    if gpu_experts and residence.card is None:
        raise UsageError("No expert can be kept on a card here: there is none in use.", "Leave out --gpu-experts.")
    slots = gpu_experts or 0
    if residence.device.type == "cuda":
        placement = placed(checkpoint, probe(), residence.device.index or 0, tokens)
        if not placement.on_gpu:
            log.warning("The card does not hold the resident weights and the KV cache; it is not used.")
            return replace(residence, device=CPU, card=None), 0
        slots = placement.vram_slots if gpu_experts is None and residence.card is not None else slots
    return residence, slots


def placed(checkpoint: Checkpoint, hardware: Hardware, index: int, tokens: int) -> Placement:
    """The plan for `checkpoint` as it is stored, on card `index` of `hardware`, with what is free there."""
    found = known(str(checkpoint.path))
    mix = found.stored or parts.native(found.config)
    card = hardware.gpus[index]
    room = min(card.memory_total, card.memory_free + parts.CUDA_CONTEXT)  # what is free is so beside our own context
    hardware = replace(hardware, gpus=(card._replace(memory_total=room),))
    return place(found.config, hardware, Options(ctx=tokens, resident=found.stored_resident, stored=mix), mix)


def keep_hot(model: Transformer, slots: int, counts: np.ndarray, on_bytes: OnBytes) -> ExpertCache | None:
    """Give `slots` experts room on the model's card, first those of the highest `counts` [layers, experts].

    None where there are no slots or no experts in RAM that our kernels take, and where the card has not got the memory.
    Raises KimiError if copying an expert fails.
    """
    layers = [block.ffn.experts for block in model.blocks if isinstance(block.ffn, MoE)]
    in_ram = [experts.expert_bytes.max() for experts in layers if isinstance(experts, PackedExperts)]
    if not slots or not in_ram or model.card is None:
        return None
    try:
        cache = ExpertCache(model.config, slots, int(max(in_ram)), model.card.device)
    except RuntimeError as error:
        log.warning("No experts are kept on the card: %s", first_line(error))
        return None
    model.keep_hot(cache)
    cache.fill(counts, on_bytes)
    return cache


# -- RAM -------------------------------------------------------------------------------------------------------------
def load_bytes(checkpoint: Checkpoint, residence: Residence) -> int:
    """Bytes that `Transformer` will read."""
    parts = _parts(checkpoint, residence)
    return sum(parts.values()) - (0 if residence.tier is None else parts["routed_experts"])


def _parts(checkpoint: Checkpoint, residence: Residence) -> dict[str, int]:
    """Bytes of the parts that are loaded, wherever to."""
    ours = residence.device.type == "cpu" or residence.card is not None
    return checkpoint.load_bytes(residence.dtype.itemsize, packed=ours and not residence.exact)


def _ram_bytes(checkpoint: Checkpoint, residence: Residence, tokens: int) -> dict[str, int]:
    """Bytes of the parts that will be in RAM, with a KV cache of `tokens` tokens."""
    parts, config = _parts(checkpoint, residence), checkpoint.config
    if residence.device.type != "cpu":
        embedding = config.vocab_size * config.hidden_size * residence.dtype.itemsize
        return {"routed_experts": parts["routed_experts"], "embedding": embedding}
    return parts | {"KV_cache": tokens * config.kv_bytes_per_token(residence.dtype.itemsize)}


def open_tier(checkpoint: Checkpoint, residence: Residence, tokens: int, ram_budget: int | None) -> NvmeTier | None:
    """None where all routed experts are to be in RAM, else what keeps `ram_budget` bytes of them there.

    Refuses, with the sizes, what memory cannot hold: before a weight is read.
    """
    parts = _ram_bytes(checkpoint, residence, tokens)
    experts, needed, available = parts["routed_experts"], sum(parts.values()), available_ram()
    room = available - (needed - experts)
    pack = checkpoint if isinstance(checkpoint, Pack) and not residence.exact else None
    if ram_budget is not None and pack is None:
        raise UsageError("Only packs, with int8 activations, run with a RAM budget.", "Make one: kimi-local quantize.")
    if pack is not None and ram_budget is not None and ram_budget < experts and ram_budget <= room:
        return NvmeTier(pack, ram_budget)
    if pack is not None and ram_budget is None and 0 < room < experts:
        return NvmeTier(pack, max(0, room - available // SPARE))
    if experts > room:
        sizes = ", ".join(f"{name.replace('_', ' ')} {size / GIB:,.1f} GiB" for name, size in parts.items())
        raise DoesNotFit(
            f"This model needs {needed / GIB:,.1f} GiB of memory ({sizes}; {tokens:,} tokens of context) and "
            f"{available / GIB:,.1f} GiB are free.",
            "Nothing was read. Use a smaller --ctx or --ram-budget, a smaller model, or a machine with more memory.",
        )
    return None
