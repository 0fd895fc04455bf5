"""What can be seen of a running model from outside: experts, memory, pages, machine.

Any thread may ask at any time: nothing here takes a lock or makes the engine wait. Counts are copied while they may be
added to, so that what is missed in one look is in the next.
"""

import platform
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch

from hybrid.engine.engine import Engine
from hybrid.memory import in_use
from hybrid.memory.bandwidth import remembered_ceiling
from hybrid.memory.hardware import Hardware, available_ram, probe
from hybrid.memory.kv_cache import PAGE_SIZE
from hybrid.memory.place import Placement
from hybrid.memory.tiers import NvmeTier

IN_RAM, ON_CARD, ON_DRIVE = range(3)


class Insight:
    """Of the model that `engine` runs, loaded by `placement`, some of whose experts `tier` may keep on the drive."""

    def __init__(self, engine: Engine, placement: Placement, tier: NvmeTier | None) -> None:
        self._engine, self._placement, self._tier = engine, placement, tier

    # -- experts ----------------------------------------------------------------------------------------------------
    @property
    def layers(self) -> list[int]:
        """The layers that have routed experts: rows of what follows."""
        return list(self._engine.model.stats.layers)

    def counts(self) -> np.ndarray:
        """int64 [layers, experts]: how often each was chosen since the model was loaded."""
        return self._engine.model.stats.counts[self.layers]

    def places(self) -> np.ndarray:
        """uint8 [layers, experts]: where each would be read now: IN_RAM, ON_CARD or ON_DRIVE."""
        stats, cache = self._engine.model.stats, self._engine.model.cache
        places = np.full(stats.counts.shape, IN_RAM, np.uint8)
        if self._tier is not None:
            places[~self._tier.held()] = ON_DRIVE
        if cache is not None:
            places[cache.held()] = ON_CARD
        return places[self.layers]

    def report(self) -> dict[str, Any]:
        """Use of the routed experts since loading: `layers`, `counts` int64 [layers, experts] as lists, `tier`
        and `cache`.

        `tier` is None where no expert is on a drive alone, and `cache` where none are on a card; else `TierCounters`
        and `CacheCounters`, each with its `hit_rate`, `slots` and `slot_bytes`.
        """
        tier, cache = self._tier, self._engine.model.cache
        return {
            "layers": self.layers,
            "counts": self.counts().tolist(),
            "tier": None if tier is None else tier.counters.report(tier.slots.count, tier.slot_bytes),
            "cache": None if cache is None else cache.counters.report(cache.count, cache.slot_bytes),
        }

    # -- memory -----------------------------------------------------------------------------------------------------
    def pages(self) -> dict[str, int]:
        """Pages of the KV cache, how many of them are free or `kept` as a prefix, and the tokens of one."""
        kv, kept = self._engine.kv, self._engine.cache.count
        return {"pages": kv.num_pages, "free": len(kv.free), "kept": kept, "page_tokens": PAGE_SIZE}

    def disk(self) -> dict[str, Any] | None:
        """Rows of prompts kept on disk: `directory` of this model's `blocks`, with their `bytes`; bytes `used` of the
        `budget` that all models share; files `dropped` as damaged since loading.

        None where nothing is kept. Looks at every file: milliseconds.
        """
        if self._engine.disk is None:
            return None
        files = self._engine.disk.files
        blocks, used = files.usage()
        return {
            "directory": str(files.directory),
            "blocks": len(blocks),
            "bytes": sum(blocks),
            "used": used,
            "budget": files.budget,
            "dropped": files.dropped,
        }

    def memory(self) -> dict[str, Any]:
        """Bytes of `ram`, `vram` and `nvme`, planned and real; see `hybrid.memory.in_use`. None where not in use."""
        return {"ram": self._ram(), "vram": self._vram(), "nvme": self._nvme()}

    def _ram(self) -> dict[str, Any]:
        total, available, rss = self.hardware.ram_total, available_ram(), psutil.Process().memory_info().rss
        others = max(0, total - available - rss)
        real = in_use.real_ram(
            rss,
            experts=self._placement.expert_bytes,
            weights=self._engine.model.resident_bytes,
            kv=0 if self._on_card else self._kv_bytes(),
        )
        return in_use.area(total, in_use.planned_ram(self._placement, others), real | {"others": others})

    def _vram(self) -> dict[str, Any] | None:
        if not self._on_card:
            return None
        kv, cache = self._engine.kv.rows, self._engine.model.cache
        free, total = torch.cuda.mem_get_info(kv.device)
        reserved, allocated = torch.cuda.memory_reserved(kv.device), torch.cuda.memory_allocated(kv.device)
        experts = 0 if cache is None else cache.data.nbytes
        real = in_use.real_vram(reserved, allocated, experts=experts, kv=kv.nbytes)
        plan = in_use.by_kind(self._placement.vram.parts)
        return in_use.area(total, plan, real | {"others": max(0, total - free - reserved)})

    def _nvme(self) -> dict[str, Any] | None:
        """What is read from the drive has its place there whatever happens."""
        experts = in_use.by_kind(self._placement.nvme.parts)
        return in_use.area(self._placement.nvme.size, experts, experts) if self._tier is not None else None

    def _kv_bytes(self) -> int:
        """Of pages in use: memory is taken as they are first written."""
        kv = self._engine.kv
        return kv.rows.nbytes * (kv.num_pages - len(kv.free)) // max(1, kv.num_pages)

    @property
    def _on_card(self) -> bool:
        return self._engine.kv.rows.device.type == "cuda"

    # -- machine ----------------------------------------------------------------------------------------------------
    @cached_property
    def hardware(self) -> Hardware:
        """As it was when first asked for."""
        return probe()

    def machine(self) -> dict[str, Any]:
        """What a report of a bug should say of the machine."""
        hardware = self.hardware
        return {
            "system": platform.platform(terse=True),
            "processor": hardware.cpu_model,
            "cores": hardware.physical_cores,
            "threads": torch.get_num_threads(),
            "kernels": hardware.kernels,
            "ram": hardware.ram_total,
            "ram_ceiling_gbps": remembered_ceiling(torch.get_num_threads()),
            "gpus": [gpu.name for gpu in hardware.gpus],
            "device": str(self._engine.kv.rows.device),
            "python": hardware.python,
            "versions": dict(hardware.versions),
        }
