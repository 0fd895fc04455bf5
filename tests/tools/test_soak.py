"""tools/soak.py on a tiny model: a sound server, and what makes one unsound."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOUND: dict[str, Any] = {"memory_growth": 0.01, "health_p99_s": 0.1, "wrong": [], "stuck": 0, "pages_lost": 0}


@pytest.fixture
def soak() -> ModuleType:
    return importlib.import_module("soak")


def test_clients_come_and_go(
    soak: ModuleType, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "MEMORY_EVERY", 0.1)
    soak.main([str(tiny), "--minutes=0.15", "--clients=4", "--ctx=512", "--threads=1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["wrong"] == [] and found["stuck"] == found["pages_lost"] == 0
    assert found["outcomes"]["left on the way"] > 0 and found["health_asked"] > 5


@pytest.mark.parametrize(
    "change",
    [{"memory_growth": 0.03}, {"health_p99_s": 0.3}, {"wrong": ["/health"]}, {"stuck": 1}, {"pages_lost": 2}],
)
def test_what_is_not_sound(soak: ModuleType, change: dict[str, Any]) -> None:
    assert soak.sound(SOUND) and not soak.sound(SOUND | change)


def test_memory_is_compared_by_medians(soak: ModuleType) -> None:
    start, end = [(at, 1000) for at in range(20)], [(at, 150) for at in range(90, 100)]
    memory = [*start, *((at, 100) for at in range(20, 90)), *end[:5], (95, 999), *end[6:]]
    assert soak.growth(memory, 100) == pytest.approx(0.5)
