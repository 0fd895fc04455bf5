"""Kimi K2.5 at its real size on fake cuda tensors: it runs through, and takes what the planner says it takes."""

import pytest
import torch

from hybrid.memory import parts
from hybrid.memory.known import known
from tests.model.gpu.fake_cuda import CUDA, Answers, Memory
from tests.model.gpu.full_size import measure

CONFIG, CHUNK = known("k2.5").config, 8192


def planned(resident: str, ctx: int, kv: str = "bf16") -> tuple[int, int]:
    """Weights and KV cache, in bytes."""
    return sum(parts.resident(CONFIG, resident).parts(CONFIG).values()), parts.kv_bytes(CONFIG, ctx, 1, kv)


@pytest.mark.slow
def test_a_prefill_chunk_and_a_decode_step() -> None:
    ctx = CHUNK + 64
    taken = measure(CONFIG, resident="int8", ctx=ctx, chunk=CHUNK)
    weights, kv = planned("int8", ctx)
    assert taken.weights == pytest.approx(weights, rel=0.001) and taken.kv == kv
    activations = parts.gpu_prefill_bytes(CONFIG, CHUNK, 0)["prefill activations"]
    assert taken.prefill_peak == pytest.approx(activations, rel=0.1)
    assert taken.total == pytest.approx(weights + kv + activations, rel=0.03)
    assert taken.decode_peak < 64 << 20
    layers, packed = CONFIG.num_hidden_layers, 4 * CONFIG.num_hidden_layers + CONFIG.num_hidden_layers + 1
    assert taken.kernels["attend_pages"] == taken.kernels["merge_parts"] == layers
    assert taken.kernels["multiply_groups"] == packed  # joined q_a and kv_a, q_b, o; joined gate and up, down; the head


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8"])
def test_unquantized_residents(kind: str) -> None:
    taken = measure(CONFIG, resident="bf16", ctx=32768, chunk=0, kv=kind)
    weights, kv = planned("bf16", 32768, kind)
    assert taken.weights == pytest.approx(weights, rel=0.001) and taken.kv == kv
    assert taken.kernels == dict.fromkeys(("attend_pages", "merge_parts"), CONFIG.num_hidden_layers)


def test_experts_in_slots() -> None:
    """The card multiplies some while the host multiplies the others."""
    slots = 1000
    taken = measure(CONFIG, resident="int8", ctx=32768, chunk=0, slots=slots)
    planned = slots * parts.uniform(CONFIG, "trellis2").largest(CONFIG)
    assert planned * 0.999 < taken.slots < planned + (16 << 20), "and tables"
    assert taken.decode_peak < 64 << 20
    assert taken.kernels["multiply_trellis"] == 2 * CONFIG.num_moe_layers
    assert taken.kernels["encode_rows"] > CONFIG.num_moe_layers


def test_memory_counts_storages_once_and_forgets_them() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    memory = Memory()
    with FakeTensorMode(), memory, Answers():
        a = torch.empty(1024, device=CUDA)
        view = a[2:4]
        assert memory.live == 4096
        b = a + a
        assert memory.live == 8192
        del a, b
        assert memory.live == 4096 and view.shape == (2,)
        del view
        assert (memory.live, memory.peak) == (0, 8192)
