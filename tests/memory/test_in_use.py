"""Who has the memory."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hybrid.memory import in_use, parts
from hybrid.memory.hardware import Gpu, Hardware
from hybrid.memory.known import known
from hybrid.memory.place import Options
from hybrid.memory.plan import choose

GIB = 1 << 30
MACHINE = Hardware(ram_total=640 * GIB, ram_available=600 * GIB)
SIZES = st.integers(0, 10**12)


def test_every_byte_of_a_plan_has_a_kind() -> None:
    card = Gpu("", 48 * GIB, 48 * GIB, "8.9")
    for gpus, ram in (((), 640 * GIB), ((card,), 640 * GIB), ((card,), 128 * GIB)):
        hardware = replace(MACHINE, gpus=gpus, ram_total=ram, ram_available=ram - 10 * GIB)
        placement = choose(known("k2.5").config, hardware, Options(running=True))
        for area in (placement.ram, placement.vram, placement.nvme):
            kinds = in_use.by_kind(area.parts)
            assert set(kinds) <= set(in_use.KINDS) and sum(kinds.values()) == area.total
        mine = in_use.planned_ram(placement, others=7)
        assert mine["others"] == 7 and mine["program"] >= parts.PROGRAM
        assert mine["experts"] == placement.expert_bytes > 0


@given(SIZES, SIZES, SIZES, SIZES)
def test_what_a_process_has_adds_up(rss: int, experts: int, weights: int, kv: int) -> None:
    real = in_use.real_ram(rss, experts=experts, weights=weights, kv=kv)
    assert sum(real.values()) == rss and min(real.values()) >= 0


def test_what_a_card_has_adds_up() -> None:
    real = in_use.real_vram(100, 90, experts=40, kv=30)
    assert real == {"experts": 40, "weights": 20, "kv": 30, "program": 10}


def test_kinds_come_in_order_and_empty_ones_do_not() -> None:
    told = in_use.area(9, {"others": 1, "experts": 2, "kv": 0}, {"kv": 3})
    assert told == {"size": 9, "planned": {"experts": 2, "others": 1}, "real": {"kv": 3}}
    assert list(told["planned"]) == ["experts", "others"]
