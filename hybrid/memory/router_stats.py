"""How often each expert was chosen: cheap to record, the basis of every decision about where experts live.

Counts of all runs of a model are kept in the user's cache, in a file named by the model's fingerprint: a pack and the
checkpoint it was made of share it, because they route alike.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import platformdirs

from hybrid.checkpoint import Checkpoint
from hybrid.checkpoint.calibration import fingerprint
from hybrid.config import ModelConfig
from hybrid.memory.remembered import remember

HOT = 0.1  # the share of a layer's experts whose part of its choices `layer_heat` gives

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """What became of the experts asked for where they lie in several places; one counts once per step and layer."""

    hits: int = 0  # lay where they are multiplied fastest
    misses: int = 0
    evictions: int = 0
    ram_bytes: int = 0  # read from RAM to multiply
    stall_s: float = 0.0  # seconds in which arithmetic waited

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    def report(self, slots: int, slot_bytes: int) -> dict[str, Any]:
        """All of it by name, with the hit rate and how much room there is."""
        return asdict(self) | {"hit_rate": self.hit_rate, "slots": slots, "slot_bytes": slot_bytes}

    def reset(self) -> None:
        self.__dict__.update(type(self)().__dict__)


@dataclass
class TierCounters(Counters):
    """Where some experts stay on the drive: hits lay in RAM, misses and stalls are waits for the drive."""

    foreseen: int = 0  # reads begun before they were asked for
    nvme_bytes: int = 0  # read from the drive


@dataclass
class CacheCounters(Counters):
    """Where a card holds some: hits are multiplied there, misses by the CPU; stalls wait for the card."""

    uploads: int = 0
    card_bytes: int = 0  # of hits
    upload_bytes: int = 0


class RouterStats:
    """Counts by layer and expert since the model was loaded."""

    def __init__(self, config: ModelConfig) -> None:
        self.layers = config.moe_layers
        self.counts = np.zeros((config.num_hidden_layers, config.n_routed_experts), np.int64)
        self.expert_bytes = 0  # of routed experts the host read so far; one counts once per step and layer
        self.tier: TierCounters | None = None  # of the NVMe tier, where there is one
        self.cache: CacheCounters | None = None  # of the experts in a card's memory, where there are any

    def record(self, layer: int, topk_ids: np.ndarray, expert_bytes: np.ndarray) -> None:
        """topk_ids int [tokens, k] of one step; `expert_bytes` int64 [experts], what the host reads to apply each."""
        chosen = np.bincount(topk_ids.reshape(-1), minlength=self.counts.shape[1])
        self.counts[layer] += chosen
        self.expert_bytes += int(expert_bytes[chosen > 0].sum())

    def reset(self) -> None:
        """Start counting afresh."""
        self.counts[:] = 0
        self.expert_bytes = 0
        for counters in (self.tier, self.cache):
            if counters is not None:
                counters.reset()


# -- on disk ----------------------------------------------------------------------------------------------------------
def stats_file(checkpoint: Checkpoint) -> Path:
    """Where this model's counts are kept; there may be nothing yet."""
    return platformdirs.user_cache_path("kimi-local") / "router" / f"{fingerprint(checkpoint)[:32]}.json"


def read_counts(path: Path, config: ModelConfig) -> np.ndarray:
    """int64 [layers, experts] as `RouterStats.counts`, of all saved runs; zeros where the file says nothing of use."""
    counts = np.zeros((config.num_hidden_layers, config.n_routed_experts), np.int64)
    try:
        for layer, row in json.loads(path.read_text())["counts"].items():
            counts[int(layer)] = np.array(row, np.int64).reshape(config.n_routed_experts)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        log.debug("%s: %r: no counts of earlier runs", path, error)
        return np.zeros_like(counts)
    return counts if (counts >= 0).all() else np.zeros_like(counts)


def save_counts(path: Path, config: ModelConfig, counts: np.ndarray) -> None:
    """Add `counts` to what the file holds, whole or not at all; where it cannot be written, nothing is kept."""
    if not counts.any():
        return
    total = read_counts(path, config) + counts
    rows = {str(layer): total[layer].tolist() for layer in config.moe_layers}
    remember(path, {"counts": rows})


# -- what they say ----------------------------------------------------------------------------------------------------
def odds(counts: np.ndarray, per_token: int) -> np.ndarray:
    """In which share of steps each expert is used by a token that chooses `per_token`, as `counts` [layers, experts]
    say; zeros for a layer without any."""
    return np.minimum(1, per_token * counts / np.maximum(1, counts.sum(1, keepdims=True)))


class LayerHeat(NamedTuple):
    """How unevenly a layer chooses."""

    choices: int
    hot_share: float  # of its choices, those of the hottest tenth of its experts
    entropy: float  # bits, of the distribution over experts; log2(experts) where all are chosen alike


def layer_heat(counts: np.ndarray) -> LayerHeat:
    """counts int64 [experts] of one layer."""
    total = int(counts.sum())
    if not total:
        return LayerHeat(0, 0.0, 0.0)
    shares = np.sort(counts)[::-1] / total
    used = shares[shares > 0]
    hot = max(1, round(HOT * len(counts)))
    return LayerHeat(total, float(shares[:hot].sum()), float(-(used * np.log2(used)).sum()) + 0.0)
