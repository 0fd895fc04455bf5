"""What is seen of a model from outside: experts wherever they are, and memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hybrid import Kimi, SamplingParams
from hybrid.checkpoint import open_pack
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import Settings, quantize
from hybrid.convert.plan import INT4
from hybrid.engine.insight import IN_RAM, ON_DRIVE
from hybrid.memory.slots import slot_bytes

SLOTS, EXPERTS = 9, 16
PARAMS = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kimi]:
    """A model nine of whose experts are in RAM and the others on the drive."""
    root = tmp_path_factory.mktemp("insight")
    pack = quantize(make_tiny(root / "source"), root / "pack", Settings(mix=INT4), threads=1)
    with open_pack(pack) as opened:
        budget = SLOTS * slot_bytes(opened)
    with Kimi.load(pack, ctx=256, threads=1, ram_budget=budget) as kimi:
        yield kimi


def test_places_follow_the_experts(kimi: Kimi) -> None:
    before = kimi.insight.places()
    assert before.shape == (2, 8) and (before == IN_RAM).sum() == SLOTS
    assert (before == ON_DRIVE).sum() == EXPERTS - SLOTS
    list(kimi.generate([1, 2, 3], PARAMS))
    after = kimi.insight.places()
    assert (after == IN_RAM).sum() <= SLOTS and (after != before).any(), "some came in, others gave way"


def test_counts_are_a_copy(kimi: Kimi) -> None:
    before = kimi.insight.counts()
    list(kimi.generate([4, 5, 6], PARAMS))
    steps = 3 + PARAMS.max_tokens - 1
    assert (kimi.insight.counts() - before).sum(1).tolist() == [steps * kimi.config.num_experts_per_tok] * 2


def test_memory(kimi: Kimi) -> None:
    told = kimi.insight.memory()
    assert told["vram"] is None
    assert told["nvme"]["real"]["experts"] == kimi.placement.mix.bytes(kimi.config)
    ram = told["ram"]
    assert ram["planned"]["experts"] == ram["real"]["experts"] == kimi.placement.expert_bytes
    assert ram["planned"]["kv"] == 256 * kimi.config.kv_bytes_per_token() >= ram["real"]["kv"]


def test_pages(kimi: Kimi) -> None:
    pages = kimi.insight.pages()
    assert pages["pages"] * pages["page_tokens"] == 256
    assert pages["kept"] > 0 and pages["free"] + pages["kept"] == pages["pages"]
