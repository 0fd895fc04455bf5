"""The planner against arithmetic written down here on its own, and what must hold for any machine."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.config import ModelConfig
from hybrid.errors import UsageError
from hybrid.memory import parts
from hybrid.memory.achieved import compare
from hybrid.memory.hardware import Gpu, Hardware
from hybrid.memory.known import known, options_for
from hybrid.memory.place import Options, Placement, place
from hybrid.memory.plan import MemoryPlan, choose, commands, make_plan
from hybrid.memory.rates import rates
from hybrid.memory.simulate import FLAT, SKEWED

GIB = 1 << 30
K25 = known("k2.5").config
# A DeepSeek V3 shape and a small dense-first one, for variety.
V3 = replace(K25, n_routed_experts=256, num_attention_heads=128, vocab_size=129280, first_k_dense_replace=3)
SMALL = replace(
    K25, hidden_size=512, num_hidden_layers=6, n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=256,
    intermediate_size=1024, num_attention_heads=8, q_lora_rank=None, vocab_size=1000, max_position_embeddings=65536,
)  # fmt: skip


def machine(ram: float, vram: float = 0.0, cores: int = 16) -> Hardware:
    gpus = (Gpu("4090", int(vram * GIB), int(vram * GIB), "8.9"),) if vram else ()
    return Hardware(kernels="avx512vnni", physical_cores=cores, threads=cores, ram_total=int(ram * GIB), gpus=gpus)


def planned(config: ModelConfig, hardware: Hardware, **options: object) -> MemoryPlan:
    return make_plan(config, hardware, Options(**options), speeds=rates(hardware, ram=75, disk=7))  # type: ignore[arg-type]


# -- plans for machines people have -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_reduced_rows_are_planned_with_what_decodes_them(kind: str) -> None:
    usual, reduced = (planned(K25, machine(256, 24), ctx=65536, kv=kv) for kv in ("bf16", kind))
    vram = reduced.placement.vram.parts
    assert vram["KV cache"] == 65536 * 61 * 656 and vram["decoded rows"] == 65536 * (2 * 576 + 6 * 512)
    assert "decoded rows" not in usual.placement.vram.parts
    assert reduced.placement.vram_slots > usual.placement.vram_slots
    assert commands(reduced, "M")[-1].startswith(f"kimi-local chat M-pack --ctx 65536 --kv {kind}")
    host = planned(K25, machine(256), ctx=65536, kv=kind)
    assert host.placement.ram.parts["decoded rows"] == 65536 * 2 * 576
    assert host.predicted is not None and reduced.predicted is not None and usual.predicted is not None
    assert reduced.predicted.decode_tok_s.value >= usual.predicted.decode_tok_s.value
    assert not any("--kv" in other.change for other in planned(K25, machine(16), kv=kind).nearest), "it is so already"


def test_the_machine_this_was_made_for() -> None:
    plan = planned(K25, machine(256, 24))
    placement = plan.placement
    assert plan.fits and 1.95 <= plan.bpw <= 2.0 and placement.tier == "mirrored"
    assert placement.on_gpu and placement.resident == "int8" and placement.nvme.total == 0
    # By hand: 24 GiB less 2 % and 0.625 for CUDA, 11.33 of residents, 2.14 of cache, 0.13 of buffers, 1.56 for a chunk.
    left = 24 * 0.98 - 0.625 - 11.33 - 2.145 - 0.13 - 1.56
    assert placement.vram_slots == pytest.approx(left * GIB / 11_034_624, abs=10)
    # By hand: 256 GiB less 3 and 3 %, the program, CUDA in it, the embedding, staging of 64 experts.
    room = 256 - 3 - 7.68 - 0.55 - 2 - 2.19 - 0.66
    assert placement.ram.left / GIB == pytest.approx(room - plan.experts_bytes / GIB, abs=0.05)
    assert plan.predicted is not None
    decode, prefill, load = plan.predicted
    # By hand: 5.28 GB at 64 GB/s, less 15 % of hits, 11.9 GB of the card at 857 GB/s, 61 times 0.15 ms.
    by_hand = 1 / (0.85 * 5.28 / 63.75 + 11.9 / 857 * 0.7 + 61 * 0.15e-3)
    assert decode.value == pytest.approx(by_hand, rel=0.1) and decode.limit == "RAM bandwidth"
    assert 400 < prefill.value < 900
    assert load.value == pytest.approx((253.7 + 14.5) / 7 + 4, rel=0.05) and load.limit == "NVMe"


@pytest.mark.parametrize(
    ("ram", "tier", "least", "most"),
    [
        (256, "mirrored", 1.95, 2.0),
        (192, "mirrored", 1.5, 1.55),
        (190, "exclusive", 1.5, 1.51),
        (128, "nvme", 1.5, 1.51),
        (64, "nvme", 1.5, 1.51),
        (384, "mirrored", 3.0, 3.01),
        (768, "mirrored", 4.5, 4.5),
    ],
)
def test_less_memory_gives_fewer_bits_then_a_drive(ram: int, tier: str, least: float, most: float) -> None:
    plan = planned(K25, machine(ram, 24))
    assert plan.fits and plan.placement.tier == tier and least <= plan.bpw <= most


def test_native_experts_on_256_gib_need_the_drive() -> None:
    plan = planned(K25, machine(256, 24), experts="native")
    assert plan.fits and plan.placement.tier == "nvme" and plan.placement.nvme.total == 570_760_888_320
    assert plan.predicted is not None and plan.predicted.decode_tok_s.limit == "NVMe"
    assert any(other.tier == "mirrored" and other.bpw < 2.1 for other in plan.others)
    without = planned(K25, machine(256, 24), experts="native", nvme=False)
    assert not without.fits and without.placement.lacks > 280 * GIB
    assert {other.tier for other in without.nearest} >= {"mirrored", "nvme"}


@pytest.mark.parametrize("experts", ["auto", "native"])
@pytest.mark.parametrize("ram", [256, 192, 128, 64])
def test_the_cards_experts_count_where_ram_holds_too_few(ram: int, experts: str) -> None:
    """What is on the card is not on the drive's account, and the more of it the fewer are read."""
    hardware = machine(ram, 24)
    plan, none = (planned(K25, hardware, experts=experts, gpu_experts=most) for most in (None, 0))
    with_card, without = plan.placement, none.placement
    assert plan.fits and none.fits and without.vram_slots == 0 and not without.exclusive
    assert plan.as_dict()["experts"]["exclusive"] == with_card.exclusive == (with_card.tier != "mirrored")
    if with_card.tier == "mirrored":
        assert ram >= 192 and experts == "auto" and with_card.ram_slots == K25.num_experts
        return
    assert with_card.tier == without.tier == "nvme" and with_card.ram_slots == without.ram_slots
    read = K25.num_experts - with_card.ram_slots - with_card.vram_slots
    assert read == K25.num_experts - without.ram_slots - with_card.vram_slots > 0 < with_card.vram_slots
    assert with_card.vram.parts["expert slots"] == with_card.vram_slots * with_card.mix.largest(K25)
    assert plan.predicted is not None and none.predicted is not None
    assert plan.predicted.prefill_tok_s.value > none.predicted.prefill_tok_s.value


def test_the_card_closes_the_gap() -> None:
    """190 GiB hold 1.5 bits with the card's experts and not without."""
    hardware = machine(190, 24)
    assert planned(K25, hardware).placement.tier == "exclusive"
    assert planned(K25, hardware, gpu_experts=0).placement.tier == "nvme"
    without = planned(K25, hardware, experts="trellis1_5", gpu_experts=0, nvme=False)
    assert not without.fits and planned(K25, hardware, experts="trellis1_5", nvme=False).fits


def test_a_budget_holds_the_plan_to_it() -> None:
    mix = parts.uniform(K25, "trellis2")
    size, largest = mix.bytes(K25), mix.largest(K25)

    def found(budget: int, **options: object) -> Placement:
        return planned(
            K25, machine(300, 24), stored=mix, stored_resident="int8", ram_budget=budget, **options
        ).placement

    assert found(size).tier == "mirrored" and found(size - 1).tier == "exclusive"
    less = found(1000 * largest + 17, gpu_experts=300)
    assert (less.tier, less.ram_slots, less.vram_slots) == ("nvme", 1000, 300) and less.expert_bytes == 1000 * largest
    assert found(7 * largest).lacks and found(8 * largest).fits, "a token needs eight of a layer"
    assert found(size - largest, gpu_experts=1).ram_slots == K25.num_experts - 1
    small = planned(K25, machine(200, 24), stored=mix, stored_resident="int8", ram_budget=size - 1).placement
    assert small.lacks, "more than there is cannot be asked for"


def test_a_running_program_counts_what_is_free() -> None:
    """Its own share is taken already; a tier that fills what is free leaves some of it."""
    found, box = known("k2.5"), replace(machine(256, 24), ram_available=240 * GIB)
    options = options_for(found, box, running=True, experts="trellis2", ram_budget=None)
    placement = choose(K25, box, options)
    assert placement.ram.parts["system"] == 16 * GIB and options.ctx == 32768
    assert not {"program", "CUDA in the process"} & placement.ram.parts.keys()
    native = choose(K25, box, options_for(found, box, running=True))
    assert native.tier == "nvme" and native.ram.parts["page cache"] == 15 * GIB and native.mix == parts.native(K25)
    assert options_for(found, box, experts="auto").stored is None


def test_commands_hold_a_run_to_the_plan() -> None:
    mix = parts.uniform(K25, "trellis2")
    packed = {"stored": mix, "stored_resident": "int8"}
    plan = planned(K25, machine(128, 24), **packed)
    slots = plan.placement.vram_slots
    budget = plan.placement.ram_slots * mix.largest(K25)
    expected = f"kimi-local chat P --ctx 32768 --ram-budget {budget} --gpu-experts {slots}"
    assert plan.placement.tier == "nvme" and commands(plan, "P") == [expected]
    native = commands(planned(K25, machine(256), experts="native"), "M")
    assert native[0].startswith("kimi-local quantize M M-pack --format int4 "), "only packs are read from a drive"
    assert "--gpu-experts" not in native[1] and "--ram-budget" in native[1]


def test_vram_counts_where_ram_alone_is_too_small() -> None:
    """2.06 bits fit only if what lies on the card need not lie in RAM."""
    plan = planned(K25, machine(256, 24), experts="2.06")
    placement = plan.placement
    assert placement.tier == "exclusive" and placement.ram_slots + placement.vram_slots == K25.num_experts
    slots = placement.vram.parts["expert slots"]
    homes = placement.ram.parts["experts"] + slots
    assert homes == pytest.approx(plan.experts_bytes, rel=0.01) and placement.nvme.total == 0


def test_without_a_card_everything_is_in_ram() -> None:
    plan = planned(K25, machine(256))
    assert plan.fits and not plan.placement.on_gpu and plan.placement.vram.total == 0
    assert {"attention", "head", "KV cache", "experts"} <= set(plan.placement.ram.parts)
    # By hand: (21.14 G experts at 1.9 bits, 11.9 GB of residents) at 64 GB/s, 61 times 0.9 ms.
    assert plan.predicted is not None
    assert plan.predicted.decode_tok_s.value == pytest.approx(1 / ((5.02 + 11.9) / 63.75 + 0.055), rel=0.1)


def test_a_card_too_small_is_said_to_be_unused() -> None:
    plan = planned(K25, machine(256, 8))
    assert plan.fits and not plan.placement.on_gpu and "not used" in plan.placement.notes[0]
    long = planned(K25, machine(256, 24), ctx=262144)
    assert not long.placement.on_gpu
    assert any(other.on_gpu and "--kv fp8" in other.change for other in long.others)
    assert any(other.on_gpu and other.ctx == 131072 for other in long.others)


def test_nothing_fits_and_what_would() -> None:
    plan = planned(K25, machine(16))
    assert not plan.fits and plan.predicted is None and plan.others == ()
    assert plan.nearest and all(other.ctx <= 32768 for other in plan.nearest)
    assert "context" in plan.nearest[0].cost and plan.nearest[0].decode_tok_s > 0
    assert planned(K25, machine(2)).nearest == ()
    assert commands(planned(K25, machine(256)), "M")[-1].startswith("kimi-local chat M-pack")


def test_other_programs_memory_is_not_ours() -> None:
    busy = replace(machine(256, 24), ram_available=100 * GIB)
    assert planned(K25, busy).placement.ram.parts["system"] == 156 * GIB
    assert planned(K25, busy, reserve=GIB).placement.ram.parts["system"] == GIB


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ctx": 300_000}, "300,000 tokens is not possible"),
        ({"ctx": 0}, "is not possible"),
        ({"batch": 0}, "batch of 0"),
        ({"experts": "q4_K"}, "'q4_K' is no format"),
        ({"experts": "0.5"}, "too few"),
        ({"kv": "int4"}, "is no choice"),
    ],
)
def test_contradictions_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        planned(K25, machine(256, 24), **options)


# -- speed ------------------------------------------------------------------------------------------------------------
def test_faster_parts_make_faster_plans() -> None:
    hardware = machine(128, 24)

    def speed(**speeds: float) -> float:
        plan = make_plan(K25, hardware, Options(), speeds=rates(hardware, **{"ram": 75, "disk": 7, **speeds}))
        assert plan.predicted is not None
        return plan.predicted.decode_tok_s.value

    assert speed(disk=3) < speed() < speed(disk=14)
    assert speed(ram=40) <= speed() <= speed(ram=300)


def test_skew_and_batch_move_the_prediction() -> None:
    hardware = machine(256, 24)
    speeds = [
        make_plan(K25, hardware, Options(batch=batch, ctx=4096), skew).predicted for batch, skew in
        ((1, FLAT), (1, SKEWED), (8, SKEWED))
    ]  # fmt: skip
    assert all(speeds)
    one, skewed, eight = (found.decode_tok_s.value for found in speeds if found)
    assert one < skewed < eight


def test_a_plan_beside_a_run() -> None:
    plan = planned(K25, machine(256, 24))
    assert plan.predicted is not None
    rows = compare(plan, {"rss": 240e9, "decode_tok_s": plan.predicted.decode_tok_s.value, "note": None})
    assert [row.name for row in rows] == ["rss", "decode_tok_s"] and rows[1].ratio == 1.0
    ram = plan.placement.ram
    # The embedding is mapped from its file, and few of its rows are ever read.
    assert rows[0].predicted == ram.total - ram.parts["system"] - ram.parts["embedding"]


# -- any machine ------------------------------------------------------------------------------------------------------
OPTIONS = st.builds(
    Options,
    ctx=st.sampled_from([512, 4096, 32768, 65536]),
    batch=st.integers(1, 9),
    experts=st.sampled_from(["auto", "native", "trellis1", "trellis2", "1.7", "2.3"]),
    resident=st.sampled_from(["auto", "bf16", "int8", "int4"]),
    kv=st.sampled_from(["bf16", "fp8"]),
    nvme=st.booleans(),
)


def check(config: ModelConfig, hardware: Hardware, placement: Placement) -> None:
    assert all(size >= 0 for area in (placement.vram, placement.ram, placement.nvme) for size in area.parts.values())
    assert placement.vram.total == sum(placement.vram.parts.values()) <= placement.vram.size
    if not placement.fits:
        return
    assert placement.ram.total == sum(placement.ram.parts.values()) <= hardware.ram_total
    size = placement.mix.bytes(config)
    homes = {
        "mirrored": placement.ram.parts.get("experts", 0),
        "exclusive": placement.ram.parts.get("experts", 0) + placement.vram.parts.get("expert slots", 0),
        "nvme": placement.nvme.total,
    }
    assert homes[placement.tier] >= size
    assert 0 <= placement.vram_slots <= config.num_experts
    if placement.tier == "nvme":
        assert 0 < placement.ram_slots < config.num_experts >= placement.ram_slots + placement.vram_slots
    else:  # each expert has a home, and exclusive ones one only: all may be the card's
        elsewhere = placement.vram_slots if placement.tier == "exclusive" else 0
        assert placement.ram_slots + elsewhere == config.num_experts


@settings(max_examples=60)
@given(
    config=st.sampled_from([K25, V3, SMALL]),
    ram=st.floats(1, 1200),
    vram=st.sampled_from([0.0, 8.0, 16.0, 24.0, 48.0, 96.0]),
    options=OPTIONS,
)
def test_sums_and_bounds(config: ModelConfig, ram: float, vram: float, options: Options) -> None:
    hardware = machine(ram, vram)
    check(config, hardware, choose(config, hardware, options))


@settings(max_examples=30)
@given(ram=st.floats(40, 700), more=st.floats(0, 300), vram=st.sampled_from([0.0, 24.0, 48.0]))
def test_more_ram_never_gives_fewer_bits(ram: float, more: float, vram: float) -> None:
    less, larger = (choose(K25, machine(size, vram), Options()) for size in (ram, ram + more))
    assert not less.fits or larger.fits
    assert less.mix.bits(K25) <= larger.mix.bits(K25)


@pytest.mark.parametrize("config", [V3, SMALL, replace(SMALL, n_routed_experts=0), replace(SMALL, quant_method=None)])
def test_other_models_have_plans_too(config: ModelConfig) -> None:
    plan = planned(config, machine(900, 48))
    assert plan.fits and plan.predicted is not None
    assert all(0 < figure.low <= figure.value <= figure.high for figure in plan.predicted)
    assert plan.as_dict()["experts"]["bytes"] == plan.experts_bytes


def test_a_pack_is_planned_as_it_is() -> None:
    mix = parts.Mix({("trellis1_5", "trellis2"): 20_000, ("trellis2", "trellis2"): 3_040})
    plan = planned(K25, machine(256, 24), stored=mix, stored_resident="int8")
    assert plan.placement.mix == mix and plan.placement.resident == "int8"
    assert plan.as_dict()["experts"]["formats"] == {"trellis1_5+trellis2": 20_000, "trellis2": 3_040}
    assert commands(plan, "PACK") == ["kimi-local chat PACK --ctx 32768"]


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from hybrid.memory.plan import make_plan, Options; from hybrid.memory.known import known\n"
        "from hybrid.memory.rates import this_machine; h = this_machine(False)\n"
        "make_plan(known('k2-thinking').config, h, Options()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_placing_is_pure() -> None:
    hardware, options, mix = machine(256, 24), Options(), parts.uniform(K25, "trellis2")
    assert place(K25, hardware, options, mix) == place(K25, hardware, options, mix)
