"""What a pack will be: the bytes its experts may take, the disk it needs, what is predicted of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from hybrid.checkpoint.blob import Shapes
from hybrid.checkpoint.manifest import read_manifest
from hybrid.checkpoint.tiny import tiny_config
from hybrid.config import ModelConfig
from hybrid.convert import INT4, Settings, estimate, parse_mix, quantize
from hybrid.convert.experts import worker_count
from hybrid.convert.plan import RESERVE, expert_budget
from hybrid.convert.run import space_needed
from hybrid.convert.source import read_source
from hybrid.errors import DoesNotFit, UsageError
from hybrid.memory.kv_format import KVFormat, kv_bytes


def test_memory_large_enough_for_int4_gets_it(tmp_path: Path, source: Path) -> None:
    pack = quantize(source, tmp_path / "pack", Settings(ram=RESERVE + (1 << 30)))
    assert set(read_manifest(pack).layers[2].formats) == {INT4}


def test_the_budget_of_a_memory() -> None:
    config = ModelConfig.from_dict(tiny_config({}, experts="int4", nested=True))
    small = Settings(ram=64 << 30, ctx=32768)
    resident = 20 << 30
    room = (64 << 30) - RESERVE - resident
    assert expert_budget(config, small, resident) == room - 4096 * config.kv_bytes_per_token(), "its context is shorter"
    for kind in ("fp8", "int8"):
        codes = 4096 * config.num_hidden_layers * KVFormat.of(config, kind).row_bytes
        assert expert_budget(config, replace(small, kv=kind), resident) == room - codes
        assert codes < 4096 * config.kv_bytes_per_token()
    assert expert_budget(config, Settings(bits=2.0), resident) == config.routed_params // 4
    with pytest.raises(DoesNotFit, match="leave nothing for experts"):
        expert_budget(config, Settings(ram=16 << 30), resident)
    with pytest.raises(UsageError, match="exclude each other"):
        Settings(bits=2.0, ram=1)


def test_deleting_shards_makes_room(source: Path) -> None:
    found = read_source(source)
    sizes = {part: 300_000 for part in ("tables", "00000", "00001", "00002")}
    assert space_needed(found, sizes, [], False) == 1_200_000
    assert space_needed(found, sizes, ["tables", "00001"], False) == 600_000
    assert 300_000 <= space_needed(found, sizes, [], True) < 1_200_000


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("trellis2", ("trellis2", "trellis2")),
        ("gate_up=trellis1_5,down=trellis2", ("trellis1_5", "trellis2")),
        ("down=trellis3, gate_up=trellis1", ("trellis1", "trellis3")),
        ("trellis9", None),
        ("gate_up=trellis2", None),
        ("gate_up=trellis2,up=trellis2", None),
        ("", None),
    ],
)
def test_named_mixes(text: str, mix: tuple[str, str] | None) -> None:
    if mix is not None:
        assert parse_mix(text) == mix
        return
    with pytest.raises(UsageError, match="is no mix"):
        parse_mix(text)


def test_an_estimate_says_what_comes(tmp_path: Path, source: Path) -> None:
    settings = Settings(bits=2.6, resident="int8")
    found = estimate(source, tmp_path / "pack", settings, threads=1)
    assert list(tmp_path.iterdir()) == []
    made = read_manifest(quantize(source, tmp_path / "pack", settings))
    assert found["expert_bytes"] == made.expert_bytes
    assert 0.9 * made.resident_bytes < found["resident_bytes"] < made.resident_bytes
    assert found["seconds"] > 0 and sum(found["formats"]["down"].values()) == 16
    assert found["kv_bytes"] == 0, "bits decide"


def test_an_estimate_names_the_cache_that_it_left_room_for(tmp_path: Path, source: Path) -> None:
    config = read_source(source).config
    for kind in ("bf16", "int8"):
        found = estimate(source, tmp_path / "pack", Settings(ram=RESERVE + (1 << 30), ctx=1000, kv=kind), threads=1)
        assert (found["ctx"], found["kv"], found["kv_bytes"]) == (1000, kind, kv_bytes(config, 1000, kind))


def test_workers_are_bounded_by_memory() -> None:
    shapes = Shapes((4096, 7168), (7168, 2048))  # K2.5
    assert worker_count(shapes, 1, calibrated=True) == 1
    assert 8 <= worker_count(shapes, 64, calibrated=False) <= 16
    assert 1 <= worker_count(shapes, 64, calibrated=True) < worker_count(shapes, 64, calibrated=False)
    assert worker_count(Shapes((256, 128), (128, 128)), 64, calibrated=True) == 64
