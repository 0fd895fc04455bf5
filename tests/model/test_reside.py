"""What goes to a card and what is said when nothing does, for machines that are described and not here."""

from pathlib import Path

import pytest
import torch

from hybrid.checkpoint import open_checkpoint
from hybrid.errors import UsageError
from hybrid.memory.hardware import Gpu, Hardware
from hybrid.memory.parts import CUDA_CONTEXT
from hybrid.model import reside as module
from hybrid.model.gpu import Card
from hybrid.model.reside import fit, keep_hot, placed, reside
from hybrid.model.transformer import Residence, Transformer

CPU, CUDA, GIB = torch.device("cpu"), torch.device("cuda"), 1 << 30
BF16 = torch.bfloat16


def no_launch(*arguments: object, **constants: object) -> None:
    raise AssertionError("nothing is to be computed")


def machine(total: int, free: int) -> Hardware:
    return Hardware(ram_total=64 * GIB, gpus=(Gpu("other", GIB, GIB, "8.6"), Gpu("card", total, free, "8.9")))


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
        monkeypatch.setattr(module, "probe", lambda: machine(8 * GIB, 7 * GIB))
        expected = placed(checkpoint, machine(8 * GIB, 7 * GIB), 1, 256).vram_slots
        assert expected == checkpoint.config.num_experts
        for asked, slots in ((None, expected), (0, 0), (3, 3)):
            assert fit(checkpoint, residence, 256, asked) == (residence, slots)
        assert fit(checkpoint, Residence(device, BF16, False, 1), 256, None)[1] == 0, "without kernels there are none"
        assert not caplog.messages
        monkeypatch.setattr(module, "probe", lambda: machine(8 * GIB, 0))
        assert fit(checkpoint, residence, 256, 3) == (Residence(CPU, BF16, False, 1), 0)
    assert "does not hold" in caplog.messages[0]


def test_what_others_hold_of_a_card_is_not_ours(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        found = [placed(checkpoint, machine(24 * GIB, free), 1, 256).vram.size for free in (24 * GIB, 10 * GIB)]
    assert found == [24 * GIB, 10 * GIB + CUDA_CONTEXT]


def test_slots_need_a_card(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint, pytest.raises(UsageError, match="none in use"):
        fit(checkpoint, Residence(CPU, BF16, False, 1), 256, 1)


def test_a_card_without_memory_is_said(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much.")

    with open_checkpoint(tiny) as checkpoint:
        model = Transformer(checkpoint, Residence(CPU, BF16, False, 1))
    counts = model.stats.counts
    assert keep_hot(model, 4, counts, print) is None, "there is no card"
    model.card = Card(CPU, no_launch)
    monkeypatch.setattr(module, "ExpertCache", full)
    assert keep_hot(model, 0, counts, print) is None and not caplog.messages
    assert keep_hot(model, 4, counts, print) is None and model.cache is None
    assert caplog.messages == ["No experts are kept on the card: CUDA out of memory."]
