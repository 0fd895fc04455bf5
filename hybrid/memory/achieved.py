"""A plan beside what a run recorded: predicted against achieved, figure by figure.

A record is one JSON object; every key is optional. Bytes: `rss` of the process when it ended, `vram` at its peak.
Speeds: `decode_tok_s`, `prefill_tok_s`; `load_s` in seconds; `ram_gbps`, `disk_gbps` and `pcie_gbps` as the run saw
them. That of a model's last conversation is kept in the user's cache.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import psutil

from hybrid.checkpoint import Checkpoint
from hybrid.checkpoint.calibration import fingerprint
from hybrid.errors import UsageError
from hybrid.memory.plan import MemoryPlan
from hybrid.stats import Stats

ENOUGH = 16  # tokens in all, for a speed to be worth keeping


class Compared(NamedTuple):
    """One figure, predicted and achieved, in the record's unit."""

    name: str
    predicted: float
    achieved: float

    @property
    def ratio(self) -> float:
        """Achieved over predicted."""
        return self.achieved / self.predicted if self.predicted else float("inf")


def compare(plan: MemoryPlan, record: dict[str, Any]) -> list[Compared]:
    """The figures that `record` and `plan` both have, in a fixed order."""
    known = _figures(plan)
    return [Compared(name, known[name], float(record[name])) for name in known if record.get(name) is not None]


def _figures(plan: MemoryPlan) -> dict[str, float]:
    ram = plan.placement.ram
    figures = {"rss": float(ram.total - _not_ours(plan)), "vram": float(plan.placement.vram.total)}
    if plan.predicted:
        figures |= {name: figure.value for name, figure in plan.predicted._asdict().items()}
    return figures | {"ram_gbps": plan.rates.ram, "disk_gbps": plan.rates.disk, "pcie_gbps": plan.rates.pcie}


def _not_ours(plan: MemoryPlan) -> int:
    """Bytes of RAM in the plan that a process is not charged for: the system's, and a table mapped from its file, of
    which few rows are ever read. A table that is the head as well is read whole."""
    parts = plan.placement.ram.parts
    return parts["system"] + (0 if plan.config.tie_word_embeddings else parts["embedding"])


def read_record(path: Path) -> dict[str, Any]:
    """The record in a file. Raises UsageError if it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        record = None
    values = list(record.values()) if isinstance(record, dict) else [""]
    if not all(value is None or isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise UsageError(f"{path} is no record of a run.", 'It should hold an object such as {"decode_tok_s": 9.8}.')
    return dict(record or {})


# -- of the last run --------------------------------------------------------------------------------------------------
def run_file(checkpoint: Checkpoint) -> Path:
    """Where the record of this model's last run is kept; there may be none yet. Each pack of a model has its own."""
    place = fingerprint(checkpoint)[:24] + f"-{checkpoint.path.resolve().name}"
    return platformdirs.user_cache_path("kimi-local") / "runs" / f"{place}.json"


def recorded(replies: Collection[Stats], load_s: float, vram: int = 0) -> dict[str, float]:
    """The record of a run that is ending, in this process; speeds of all its replies together."""
    record: dict[str, float] = {"rss": psutil.Process().memory_info().rss, "load_s": round(load_s, 3)}
    if vram:
        record["vram"] = vram
    steps, seconds = sum(max(0, each.generated_tokens - 1) for each in replies), sum(each.decode_s for each in replies)
    if steps >= ENOUGH and seconds:
        record["decode_tok_s"] = round(steps / seconds, 3)
        record["ram_gbps"] = round(sum(each.host_bytes for each in replies) / seconds / 1e9, 3)
    read = [each for each in replies if each.first_token_s]  # to their end: others know no time
    prompts, seconds = sum(each.prefilled_tokens for each in read), sum(each.prefill_s for each in read)
    if prompts >= ENOUGH and seconds:
        record["prefill_tok_s"] = round(prompts / seconds, 3)
    return record
