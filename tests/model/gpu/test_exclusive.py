"""Experts that only the card has: what the plan says is what is loaded, and it answers as if all were in RAM."""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from hybrid import Kimi
from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import Settings, quantize
from hybrid.convert.plan import INT4
from hybrid.errors import CheckpointError
from hybrid.memory.expert_store import PackedExperts, stored_experts
from hybrid.memory.hardware import Gpu, Hardware
from hybrid.memory.known import known, options_for
from hybrid.memory.place import Placement
from hybrid.memory.plan import commands, make_plan
from hybrid.memory.router_stats import save_counts, stats_file
from hybrid.model.gpu import Card
from hybrid.model.moe import MoE
from tests.model.gpu.test_model import divergence

GIB, EXPERTS, LAYERS, CTX = 1 << 30, 12, (1, 2), 64
CONFIG = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
MADE = {"one": Settings(mix=("trellis2", "trellis2")), "mixed": Settings(bits=2.4), "int4": Settings(mix=INT4)}
IDS = [3, 141, 59]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A released model, and packs of it: experts of one size, of several, and in INT4."""
    root = tmp_path_factory.mktemp("exclusive")
    released = make_tiny(root / "released", config=CONFIG)
    packs = {name: quantize(released, root / name, settings, threads=1) for name, settings in MADE.items()}
    return {"released": released, **packs}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of earlier runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Box(NamedTuple):
    """A machine that is described: it has the card that runs the tests' kernels."""

    monkeypatch: pytest.MonkeyPatch
    card: Card

    def has(self, hardware: Hardware) -> None:
        self.monkeypatch.setattr("hybrid.model.reside.probe", lambda: hardware)

    def load(self, path: Path, **options: object) -> Kimi:
        return Kimi.load(path, ctx=CTX, threads=1, device=self.card.device.type, **options)  # type: ignore[arg-type]


@pytest.fixture
def box(card: Card, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    monkeypatch.setattr("hybrid.model.reside.find_card", lambda device: (card, ""))
    found = Box(monkeypatch, card)
    found.has(machine(16 * GIB, 12 * GIB))
    yield found


def machine(total: int, available: int) -> Hardware:
    return Hardware(ram_total=total, ram_available=available, gpus=(Gpu("card", 8 * GIB, 8 * GIB, "8.9"),))


def without(placement: Placement) -> int:
    """Bytes of RAM that are not the system's nor experts'."""
    return placement.ram.total - placement.ram.parts["system"] - placement.expert_bytes


def in_ram(kimi: Kimi) -> dict[int, np.ndarray]:
    """Which experts of each layer lie in arrays of their own: bool [experts]."""
    found = {}
    for block in kimi._engine.model.blocks:
        if isinstance(block.ffn, MoE):
            experts = block.ffn.experts
            assert isinstance(experts, PackedExperts)
            places = np.arange(EXPERTS) if experts.places is None else experts.places
            found[block.ffn.layer] = places >= 0
    return found


def bytes_in_ram(kimi: Kimi) -> int:
    """Of those arrays."""
    size = 0
    for block in kimi._engine.model.blocks:
        if isinstance(block.ffn, MoE):
            held = block.ffn.experts.moe.args[0]  # type: ignore[attr-defined]
            size += held.data.nbytes if hasattr(held, "data") else sum(stack.blocks.nbytes for stack in held)
    return size


def check_obeyed(kimi: Kimi) -> None:
    """What is loaded is what its plan says."""
    plan, model, tier = kimi.placement, kimi._engine.model, kimi._tier
    cache = model.cache
    assert (cache is None) == (plan.vram_slots == 0) and (tier is None) == (plan.tier != "nvme")
    on_card = np.zeros((3, EXPERTS), bool)
    if cache is not None:
        assert cache.count == plan.vram_slots == cache.held().sum() and cache.pinned == plan.exclusive
        assert cache.data.nbytes == plan.vram.parts["expert slots"]
        on_card = cache.held()
    assert kimi._engine.kv.rows.nbytes == plan.vram.parts["KV cache"]
    if tier is not None:
        assert tier.slots.count == plan.ram_slots == tier.held().sum() and not (tier.held() & on_card).any()
        assert tier.slots.count * tier.slot_bytes == plan.expert_bytes
        return
    here = in_ram(kimi)
    assert sum(int(each.sum()) for each in here.values()) == plan.ram_slots
    for layer, each in here.items():
        assert np.array_equal(each, ~on_card[layer]) if plan.exclusive else each.all()
    assert bytes_in_ram(kimi) <= plan.expert_bytes
    if len(plan.mix.counts) == 1:
        assert bytes_in_ram(kimi) == plan.expert_bytes


# -- the plan is obeyed -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "budget", "slots", "tier"),
    [
        ("one", None, None, "mirrored"),
        ("one", 18, 7, "exclusive"),
        ("one", 17, 24, "exclusive"),  # the card alone holds them
        ("one", 9, 10, "nvme"),
        ("mixed", 16, 9, "exclusive"),
        ("int4", 5, 11, "nvme"),
    ],
)
def test_loading_obeys_the_plan(
    box: Box, models: dict[str, Path], name: str, budget: int | None, slots: int | None, tier: str
) -> None:
    with Kimi.load(models[name], ctx=CTX, threads=1, device="cpu", dtype="float32") as plain:
        expected = plain.logits(IDS)
        size = plain.placement.mix.largest(plain.config)
    with box.load(models[name], ram_budget=None if budget is None else budget * size, gpu_experts=slots) as kimi:
        assert kimi.placement.tier == tier and kimi.placement.vram_slots == (24 if slots is None else slots)
        check_obeyed(kimi)
        assert divergence(expected, kimi.logits(IDS)) < 2e-2
        report = kimi.expert_report()
        if slots:
            assert report["cache"]["hits"] > 0 and report["cache"]["uploads"] == 0, "who is there stays"
        if tier == "nvme":
            assert report["tier"]["misses"] > 0
            asked = report["tier"]["hits"] + report["tier"]["misses"]
            assert asked == (report["cache"]["misses"] if slots else asked)


def test_what_is_free_decides_as_the_plan_says(box: Box, models: dict[str, Path]) -> None:
    """The same model with less and less memory free; with the same experts on the card, the answer is the same bits."""
    with box.load(models["one"], gpu_experts=10) as kimi:
        size, rest = kimi.placement.mix.largest(kimi.config), without(kimi.placement)
    found, answers = [], []
    for experts in (24, 14, 8):
        box.has(machine(16 * GIB, rest + experts * size + (rest + experts * size) // 15 * (experts == 8)))
        with box.load(models["one"], gpu_experts=10) as kimi:
            check_obeyed(kimi)
            found.append((kimi.placement.tier, kimi.placement.ram_slots, kimi.placement.vram_slots))
            assert kimi._engine.model.cache is not None
            kimi._engine.model.cache.pinned = True  # copies would give way to others
            answers.append(kimi.logits(IDS))
    assert all(torch.equal(answers[0], other) for other in answers[1:])
    assert found[:2] == [("mirrored", 24, 10), ("exclusive", 14, 10)]
    assert found[2][0] == "nvme" and found[2][1] in (7, 8) and found[2][2] == 10


def test_a_released_model_has_an_exclusive_set_too(box: Box, models: dict[str, Path]) -> None:
    with box.load(models["released"], gpu_experts=8) as kimi:
        size, rest = kimi.placement.mix.largest(kimi.config), without(kimi.placement)
        expected = kimi.logits(IDS)
    box.has(machine(16 * GIB, rest + 17 * size))
    with box.load(models["released"], gpu_experts=8) as kimi:
        assert kimi.placement.tier == "exclusive"
        check_obeyed(kimi)
        assert divergence(expected, kimi.logits(IDS)) < 1e-2


@pytest.mark.parametrize(("extra", "tier"), [(24.5, "mirrored"), (15.5, "exclusive"), (99, "nvme")])
def test_the_command_of_a_plan_loads_that_plan(box: Box, models: dict[str, Path], extra: float, tier: str) -> None:
    """Made for a machine with room for so many experts before anything runs there: then more turns out to be free."""
    path, asked = models["one"], {"ctx": CTX, "reserve": GIB, "gpu_experts": 10}
    found, large = known(str(path)), machine(64 * GIB, 0)
    roomy = make_plan(found.config, large, options_for(found, large, **asked)).placement  # type: ignore[arg-type]
    size = roomy.mix.largest(found.config)
    total = roomy.ram.total - roomy.expert_bytes + int(extra * size)
    asked |= {"ram_budget": 9 * size} if tier == "nvme" else {}
    hardware = machine(total, 0)
    made = make_plan(found.config, hardware, options_for(found, hardware, **asked))  # type: ignore[arg-type]
    assert made.placement.tier == tier
    words = shlex.split(commands(made, str(path))[-1])
    assert words[:3] == ["kimi-local", "chat", str(path)]
    parser = argparse.ArgumentParser()
    for name in ("--ctx", "--ram-budget", "--gpu-experts"):
        parser.add_argument(name, type=int)
    options = vars(parser.parse_args(words[3:]))
    box.has(machine(total, total - GIB))
    with Kimi.load(path, threads=1, device=box.card.device.type, **options) as kimi:
        check_obeyed(kimi)
        loaded, planned = kimi.placement, made.placement
        assert (loaded.tier, loaded.ram_slots, loaded.vram_slots) == (tier, planned.ram_slots, planned.vram_slots)
        assert loaded.expert_bytes == planned.expert_bytes and loaded.nvme == planned.nvme
        for part in ("KV cache", "expert slots"):
            assert loaded.vram.parts[part] == planned.vram.parts[part]


# -- who is pinned ----------------------------------------------------------------------------------------------------
def pinned(kimi: Kimi) -> np.ndarray:
    assert kimi._engine.model.cache is not None
    return kimi._engine.model.cache.held()


def test_the_hottest_of_earlier_runs_are_pinned(box: Box, models: dict[str, Path]) -> None:
    counts = np.zeros((3, EXPERTS), np.int64)
    counts[1, [2, 5, 7]], counts[2, 11] = 50, 90
    with open_checkpoint(models["one"]) as pack:
        save_counts(stats_file(pack), pack.config, counts)
        budget = pack.load_bytes()["routed_experts"] * 20 // 24
    with box.load(models["one"], ram_budget=budget, gpu_experts=4) as kimi:
        assert kimi.placement.tier == "exclusive" and np.array_equal(pinned(kimi), counts > 0)


def test_layers_share_the_card_where_nothing_is_known(box: Box, models: dict[str, Path]) -> None:
    with open_checkpoint(models["one"]) as pack:
        budget = pack.load_bytes()["routed_experts"] // 2
    with box.load(models["one"], ram_budget=budget, gpu_experts=6) as kimi:
        assert kimi.placement.tier == "nvme"
        assert pinned(kimi).sum(1).tolist() == [0, 3, 3]
        told = kimi.expert_report()
    assert told["tier"]["slots"] == 12 and told["cache"]["slots"] == 6


# -- bytes ------------------------------------------------------------------------------------------------------------
def whole(checkpoint: Checkpoint, layer: int, expert: int) -> bytes:
    return b"".join(part.tobytes() for part in stored_experts(checkpoint, layer).read(expert))


@pytest.mark.parametrize("name", ["mixed", "int4", "released"])
def test_slots_hold_what_is_stored(box: Box, models: dict[str, Path], name: str) -> None:
    with box.load(models[name], gpu_experts=24) as copied, open_checkpoint(models[name]) as checkpoint:
        cache = copied._engine.model.cache
        assert cache is not None and not cache.pinned
        for layer in LAYERS:
            slots = cache.split(layer, torch.arange(EXPERTS)[None])[0].tolist()
            for expert, slot in enumerate(slots):
                held = cache.data[slot * cache.slot_bytes :][: cache.slot_bytes].cpu().numpy().tobytes()
                assert held.startswith(whole(checkpoint, layer, expert)), (layer, expert)


def test_a_damaged_expert_is_named_on_its_way_to_the_card(box: Box, models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    path.mkdir()
    for file in models["one"].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    experts = path / "experts-00001.bin"
    content = bytearray(experts.read_bytes())
    content[70] ^= 1  # of expert 0
    experts.write_bytes(content)
    with pytest.raises(CheckpointError, match="layer 1 expert 0 does not have the checksum"):
        box.load(path, ram_budget=len(content), gpu_experts=12, verify=True)
