"""Bytes of every part, from the published shapes and beside what a checkpoint takes once loaded."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.checkpoint import open_checkpoint
from hybrid.errors import UsageError
from hybrid.memory import parts
from hybrid.memory.known import known

K25 = known("k2.5").config


def test_experts_take_what_is_published() -> None:
    assert K25.num_experts == 60 * 384 and K25.expert_params == 3 * 7168 * 2048
    assert parts.native(K25).bytes(K25) == 23_040 * 24_772_608  # 570.8 GB
    assert parts.native(K25).bits(K25) == 4.5
    one = 3 * 7168 * 2048 // 4 + 2 * (4096 + 7168)  # two bits, and a bf16 scale per row
    assert parts.uniform(K25, "trellis2").bytes(K25) == 23_040 * (-(-one // 4096) * 4096)


def test_residents_take_what_is_published() -> None:
    bf16 = parts.resident(K25, "bf16")
    sizes = bf16.parts(K25)
    assert sizes["attention"] == 61 * 101_122_048 * 2
    assert sizes["shared experts and routers"] == 2 * 2_642_411_520 + 4 * 165_150_720  # routers are fp32
    assert sizes["dense layers"] == 2 * 396_361_728 and sizes["head"] == bf16.embedding == 2 * 1_174_405_120
    assert sizes["norms"] == 2 * 1_006_592 + 4 * 384 * 60
    kv_b = 61 * 512 * 64 * 256
    assert parts.resident(K25, "int8").parts(K25)["attention"] == 2 * kv_b + (6_168_444_928 - kv_b) * 17 // 16
    assert parts.resident(K25, "int4").parts(K25)["head"] == 1_174_405_120 * 17 // 16


def test_resident_bytes_are_those_of_a_checkpoint_once_loaded(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        config, loaded = checkpoint.config, checkpoint.load_bytes()
    expected = parts.resident(config, "bf16")
    # The planner knows no padding of router biases and norms that a file may hold in other dtypes.
    assert sum(expected.parts(config).values()) + expected.embedding == pytest.approx(loaded["resident"], rel=0.005)
    assert parts.native(config).bytes(config) == pytest.approx(loaded["routed_experts"], rel=0.15)  # padded columns


def test_the_cache_takes_what_is_published() -> None:
    assert parts.kv_bytes(K25, 64, 1, "bf16") == 64 * 70_272, "and whole pages"
    assert parts.kv_bytes(K25, 1, 1, "bf16") == parts.kv_bytes(K25, 64, 1, "bf16")
    for kind in ("fp8", "int8"):
        assert parts.kv_bytes(K25, 32768, 2, kind) == 2 * 32768 * 61 * 656


@given(bits=st.floats(1.005, 3.5))
def test_a_mix_takes_no_more_than_its_bits(bits: float) -> None:
    mix = parts.of_bits(K25, bits)
    assert sum(mix.counts.values()) == K25.num_experts and 1 <= len(mix.counts) <= 2
    assert mix.bits(K25) <= bits + 1e-6
    assert mix.bits(K25) > min(bits, 3.008) - 0.0001


def test_too_few_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="The fewest are 1.01"):
        parts.of_bits(K25, 0.9)
