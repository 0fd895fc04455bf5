"""A plan beside what a run recorded: predicted against achieved, figure by figure.

A record is one JSON object; every key is optional. Bytes: `rss` and `vram`, the peaks of the process. Speeds:
`decode_tok_s`, `prefill_tok_s`; `load_s` in seconds; `ram_gbps`, `disk_gbps` and `pcie_gbps` as the run saw them.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.errors import UsageError
from hybrid.memory.plan import MemoryPlan


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
    figures = {"rss": float(ram.total - ram.parts["system"]), "vram": float(plan.placement.vram.total)}
    if plan.predicted:
        figures |= {name: figure.value for name, figure in plan.predicted._asdict().items()}
    return figures | {"ram_gbps": plan.rates.ram, "disk_gbps": plan.rates.disk, "pcie_gbps": plan.rates.pcie}


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
