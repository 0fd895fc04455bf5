"""Speeds of machines: the tables, the cards, and what is remembered of this one."""

import json
from pathlib import Path

import pytest

from hybrid.errors import UsageError
from hybrid.memory import rates as module
from hybrid.memory.gpus import CARDS, find, find_or_refuse
from hybrid.memory.hardware import Gpu, Hardware
from hybrid.memory.rates import kernel_speeds, measure_kernels, rates, this_machine
from quant import LADDER


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("4090", "4090"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("RTX 3090 Ti", "3090 Ti"),
        ("3090ti", "3090 Ti"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("4070 ti super", "4070 Ti Super"),
    ],
)
def test_cards_are_found_by_what_people_and_drivers_call_them(written: str, meant: str) -> None:
    card = find(written)
    assert card is not None and card.name == meant


def test_every_card_is_found_by_its_own_name() -> None:
    assert [find(card.name) for card in CARDS] == list(CARDS)
    assert find("") is None and find("Voodoo 2") is None
    with pytest.raises(UsageError, match="is no card known here"):
        find_or_refuse("Voodoo 2")


@pytest.mark.parametrize("kernels", ["avx512vnni", "avxvnni", "avx2", "generic", ""])
def test_every_format_has_a_speed(kernels: str) -> None:
    found = rates(Hardware(kernels=kernels, physical_cores=4, threads=8))
    names = {*LADDER, "int4_g32", "bf16", "resident bf16", "resident int8", "resident int4", "scores"}
    assert set(found.decode) == set(found.prefill) == names
    assert all(speed > 0 for speed in (*found.decode.values(), *found.prefill.values()))
    assert found.cores == 4


def test_what_is_given_goes_before_what_is_nominal() -> None:
    hardware = Hardware(kernels="avx2", physical_cores=8, threads=8, gpus=(Gpu("4090", 1, 1, "8.9"),))
    found = rates(hardware, ram=60, measured={"trellis2": 99.0})
    assert found.decode["trellis2"] == 99.0 and found.ram == 60 and found.pcie == 25
    assert found.sources == {
        "ram": "given", "disk": "assumed", "pcie": "nominal", "vram": "nominal", "kernels": "measured",
    }  # fmt: skip
    assert found.scaled(2).disk == 2 * found.disk and found.scaled(2).decode["trellis2"] == 198.0


def test_measured_kernels_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache" / "kernel-speeds.json"
    monkeypatch.setattr(module, "_cache_file", lambda: path)
    assert kernel_speeds(2) == {}
    module._remember(2, {"trellis2": 36.5})
    module._remember(4, {"trellis2": 30.0})
    assert kernel_speeds(2) == {"trellis2": 36.5} and kernel_speeds(4) == {"trellis2": 30.0}
    path.write_text(json.dumps({module._key(2): "nonsense"}))
    assert kernel_speeds(2) == {}


def test_kernels_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cache_file", lambda: tmp_path / "kernel-speeds.json")
    told: list[str] = []
    found = measure_kernels(1, told.append, hidden=256, intermediate=128, gigabytes=0.001)
    assert set(found) == {*LADDER, "int4_g32"} and min(found.values()) > 0 and len(told) == len(found)
    assert kernel_speeds(1) == found


def test_this_machine_is_known_without_torch() -> None:
    here = this_machine(with_gpu=False)
    assert here.ram_total > 0 and here.threads > 0 and here.kernels and here.gpus == ()
