"""Rows between a device and the host. The rest of the layer is compared where whole models are."""

from pathlib import Path

import pytest
import torch

from hybrid.checkpoint import open_checkpoint
from hybrid.memory.expert_cache import CopiesAtOnce, ExpertCache
from hybrid.model.moe import FEW, Crossing
from tests.memory.test_expert_cache import Recorded


def rows(count: int, hidden: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(count, hidden).bfloat16(), torch.randint(8, (count, k)), torch.rand(count, k)


def test_few_rows_come_through_buffers_made_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not CUDA itself, which this cannot run: which buffer, and that what comes down has been waited for."""
    with open_checkpoint(tiny) as checkpoint:
        config = checkpoint.config
    cache, record = ExpertCache(config, 1, 64, torch.device("cpu"), CopiesAtOnce()), Recorded()
    record.install(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        crossing = Crossing(config, torch.device("cuda"), torch.bfloat16, cache)
    places = []
    for count in (1, FEW, FEW + 1):
        given = rows(count, config.hidden_size, config.num_experts_per_tok)
        found = crossing.down(*given)
        assert all(torch.equal(a, b) for a, b in zip(given, found, strict=True))
        places.append([part.data_ptr() for part in found])
    assert places[0] == places[1] != places[2] and record.said == ["host: wait for kernels"] * 2
    assert cache.counters.stall_s > 0


def test_a_cpu_has_nothing_to_cross(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        config = checkpoint.config
    cache = ExpertCache(config, 1, 64, torch.device("cpu"))
    crossing, given = Crossing(config, torch.device("cpu"), torch.bfloat16, cache), rows(2, config.hidden_size, 2)
    assert all(a is b for a, b in zip(given, crossing.down(*given), strict=True))
    assert crossing.up(given[1]) is given[1] and cache.counters.stall_s == 0
