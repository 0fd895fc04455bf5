"""What goes to a card and what is said when nothing does, for machines that are described and not here."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import Settings, quantize
from hybrid.errors import DoesNotFit, UsageError
from hybrid.memory.hardware import Gpu, Hardware
from hybrid.memory.parts import CUDA_CONTEXT, SPARE
from hybrid.model import reside as module
from hybrid.model.gpu import Card
from hybrid.model.reside import fill_card, furnish, machine, reside, settle
from hybrid.model.transformer import Residence, Transformer

CPU, CUDA, GIB = torch.device("cpu"), torch.device("cuda"), 1 << 30
BF16 = torch.bfloat16


def no_launch(*arguments: object, **constants: object) -> None:
    raise AssertionError("nothing is to be computed")


def described(total: int, free: int) -> Hardware:
    gpus = (Gpu("other", GIB, GIB, "8.6"), Gpu("card", total, free, "8.9"))
    return Hardware(ram_total=64 * GIB, ram_available=60 * GIB, gpus=gpus)


def test_a_cpu_is_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    assert reside(CPU, BF16, False, 2) == Residence(CPU, BF16, False, 2) and not caplog.messages


@pytest.mark.parametrize(("triton", "device"), [(object(), CPU), (None, CUDA)])
def test_a_reason_is_said_once(
    triton: object, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kernels that are wrong rule the card out; where they are merely missing, torch computes on it."""
    monkeypatch.setattr(module, "find_card", lambda device: (None, "Our GPU kernels are not used."))
    monkeypatch.setattr(module, "find_spec", lambda name: triton)
    assert reside(CUDA, BF16, False, 1) == Residence(device, BF16, False, 1)
    assert caplog.messages == ["Our GPU kernels are not used."]


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, False), (BF16, True)])
def test_full_precision_is_torchs(dtype: torch.dtype, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_card", lambda device: (Card(device, no_launch), ""))
    assert reside(CUDA, dtype, exact, 1).card is None
    assert reside(CUDA, BF16, False, 1).card is not None


def test_slots_are_the_plans_unless_a_number_is_given(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cuda", 1)
    residence = Residence(device, BF16, False, 1, card=Card(device, no_launch))
    with open_checkpoint(tiny) as checkpoint:
        monkeypatch.setattr(module, "probe", lambda: described(8 * GIB, 7 * GIB))
        for asked, slots in ((None, checkpoint.config.num_experts), (0, 0), (3, 3)):
            found, placement = settle(checkpoint, residence, 256, gpu_experts=asked)
            assert found == residence and placement.vram_slots == slots and placement.tier == "mirrored"
        without = settle(checkpoint, Residence(device, BF16, False, 1), 256)[1]
        assert without.on_gpu and without.vram_slots == 0, "without kernels there are none"
        assert not caplog.messages
        monkeypatch.setattr(module, "probe", lambda: described(8 * GIB, 0))
        found, placement = settle(checkpoint, residence, 256, gpu_experts=3)
        assert found == Residence(CPU, BF16, False, 1) and not placement.on_gpu and placement.vram_slots == 0
    assert "does not hold" in caplog.messages[0]


def test_experts_that_no_kernel_takes_get_no_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", lambda: described(8 * GIB, 8 * GIB))
    residence = Residence(CUDA, BF16, False, 1, card=Card(CUDA, no_launch))
    residence = replace(residence, device=torch.device("cuda", 1))
    with open_checkpoint(make_tiny(tmp_path / "bf16", experts="bf16")) as checkpoint:
        assert settle(checkpoint, residence, 256)[1].vram_slots == 0


def test_what_others_hold_of_a_card_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    residence, sizes = Residence(torch.device("cuda", 1), BF16, False, 1), []
    for free in (24 * GIB, 10 * GIB):
        monkeypatch.setattr(module, "probe", lambda free=free: described(24 * GIB, free))
        sizes.append(machine(residence).gpus[0].memory_total)
    assert sizes == [24 * GIB, 10 * GIB + CUDA_CONTEXT]
    assert machine(Residence(CPU, BF16, False, 1)).gpus == ()


def test_slots_need_a_card(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint, pytest.raises(UsageError, match="none in use"):
        settle(checkpoint, Residence(CPU, BF16, False, 1), 256, gpu_experts=1)


@pytest.mark.parametrize("kind", ["auto", "bf16", "fp8", "int8"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_the_plan_knows_what_weights_and_cache_take(
    tiny: Path, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "probe", lambda: described(8 * GIB, 8 * GIB))
    residence = Residence(CPU, dtype, False, 1, kv=kind)
    with open_checkpoint(tiny) as checkpoint:
        _, placement = settle(checkpoint, residence, 200)
        loaded = checkpoint.load_bytes(dtype.itemsize)["resident"]
        kv = residence.make_kv(checkpoint.config, 200)
    sizes = placement.ram.parts
    assert sizes["KV cache"] == kv.rows.nbytes
    decoded = 200 * dtype.itemsize * checkpoint.config.latent_dim if kind in ("fp8", "int8") else 0
    assert sizes.get("decoded rows", 0) == decoded
    weights = ("attention", "shared experts and routers", "dense layers", "head", "norms", "embedding")
    assert sum(sizes[name] for name in weights) == pytest.approx(loaded, rel=0.005)
    assert "program" not in sizes and sizes["system"] == 4 * GIB, "this process is what runs"


def test_a_card_without_memory_is_said(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much.")

    device = torch.device("cuda", 1)
    on_card = Residence(device, BF16, False, 1, card=Card(device, no_launch))
    monkeypatch.setattr(module, "probe", lambda: described(8 * GIB, 8 * GIB))
    with open_checkpoint(tiny) as checkpoint:
        model = Transformer(checkpoint, Residence(CPU, BF16, False, 1))
        counts = model.stats.counts
        none, four = (settle(checkpoint, on_card, 64, gpu_experts=slots)[1] for slots in (0, 4))
        fill_card(model, checkpoint, four, None, counts, print)
        assert model.cache is None, "there is no card"
        model.card = Card(CPU, no_launch)
        monkeypatch.setattr(module, "ExpertCache", full)
        fill_card(model, checkpoint, none, None, counts, print)
        assert not caplog.messages
        fill_card(model, checkpoint, four, None, counts, print)
        assert model.cache is None and caplog.messages == ["No experts are kept on the card: CUDA out of memory."]
        with pytest.raises(DoesNotFit, match="no room for 4 experts: CUDA out of memory"):
            fill_card(model, checkpoint, four, np.ones(counts.shape, bool), counts, print)


# -- RAM and the drive, without a card --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 24 experts of one size, large enough to count beside the rest of a tiny model."""
    root = tmp_path_factory.mktemp("reside")
    source = make_tiny(root / "source", config={"n_routed_experts": 12, "moe_intermediate_size": 512})
    return quantize(source, root / "pack", Settings(mix=("trellis2", "trellis2")), threads=1)


@pytest.mark.parametrize(
    ("budget", "free", "tier"),
    [
        (None, 24, "mirrored"),
        (None, 23, "nvme"),
        (None, 17, "nvme"),
        (4, 24, "nvme"),
        (7, 7, "nvme"),
        (23, 99, "nvme"),
        (24, 24, "mirrored"),
        (99, 30, "mirrored"),
    ],
)
def test_what_is_loaded_is_what_was_planned(
    pack: Path, budget: int | None, free: int, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for so many experts, and so many asked for."""
    with open_checkpoint(pack) as checkpoint:
        residence, config = Residence(CPU, BF16, False, 1), checkpoint.config
        whole = settle(checkpoint, residence, 64)[1]
        size = whole.mix.largest(config)
        available = whole.ram.total - whole.ram.parts["system"] - whole.expert_bytes + free * size
        monkeypatch.setattr(module, "probe", lambda: Hardware(ram_total=2 * GIB, ram_available=available))
        _, placement = settle(checkpoint, residence, 64, ram_budget=None if budget is None else budget * size)
        assert placement.tier == tier and placement.ram.left >= 0 and placement.ram_slots >= config.num_experts_per_tok
        if tier == "mirrored":
            assert placement.ram_slots == 24
        else:
            kept_free = -(-(available // SPARE) // size)
            assert placement.ram_slots == (free - kept_free if budget is None else budget)
        counts = np.zeros((config.num_hidden_layers, config.n_routed_experts), np.int64)
        found = furnish(checkpoint, residence, placement, counts)
        assert found.pinned is None and (found.tier is None) == (tier == "mirrored")
        if found.tier is not None:
            assert found.tier.slots.count == placement.ram_slots
            assert found.tier.slots.count * found.tier.slot_bytes == placement.expert_bytes
            found.tier.close()


def test_more_than_there_is_cannot_be_asked_for(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", lambda: Hardware(ram_total=2 * GIB, ram_available=16 << 20))
    with open_checkpoint(pack) as checkpoint:
        residence = Residence(CPU, BF16, False, 1)
        size = checkpoint.load_bytes()["routed_experts"] // 24
        assert settle(checkpoint, residence, 64, ram_budget=6 * size)[1].tier == "nvme"
        monkeypatch.setattr(module, "probe", lambda: Hardware(ram_total=2 * GIB, ram_available=1 << 20))
        for budget, words in ((6 * size, "are free"), (3 * size, "a token needs 4")):
            with pytest.raises(DoesNotFit, match=words):
                settle(checkpoint, residence, 64, ram_budget=budget)
