"""The NVMe tier: whatever the budget, the bits are those of a run with all experts in RAM, and faults are said."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid import Kimi, SamplingParams
from hybrid.checkpoint import Pack, open_pack
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import Settings, quantize
from hybrid.convert.plan import INT4
from hybrid.engine.engine import Engine
from hybrid.engine.request import Request
from hybrid.errors import CheckpointError, DoesNotFit, KimiError, UsageError
from hybrid.memory.direct import Preadv
from hybrid.memory.expert_store import PackedExperts, load_experts
from hybrid.memory.hardware import Hardware
from hybrid.memory.kv_cache import KVCache
from hybrid.memory.slots import slot_bytes
from hybrid.memory.tiers import NvmeTier, combine, hottest
from hybrid.model.transformer import Residence, Transformer
from hybrid.progress import Progress

EXPERTS, K, LAYERS = 12, 4, (1, 2)
CONFIG = {"n_routed_experts": EXPERTS, "num_experts_per_tok": K, "moe_intermediate_size": 512}
IDS = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64, 33, 83, 27, 95, 2, 88, 41, 97, 16, 93]
MADE = {"mixed": Settings(bits=2.4), "int4": Settings(mix=INT4)}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model with experts in several trellis formats, and in INT4."""
    root = tmp_path_factory.mktemp("tiers")
    source = make_tiny(root / "source", config=CONFIG)
    return {name: quantize(source, root / name, settings, threads=1) for name, settings in MADE.items()}


@pytest.fixture(params=MADE)
def pack(request: pytest.FixtureRequest, packs: dict[str, Path]) -> Iterator[Pack]:
    with open_pack(packs[request.param], verify=True) as opened:
        yield opened


def tier_of(pack: Pack, slots: int, preadv: Preadv = os.preadv) -> NvmeTier:
    return NvmeTier(pack, slots * slot_bytes(pack), preadv=preadv)


def step(tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, topk_ids and topk_weights of one layer."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(EXPERTS)[:K] for _ in range(tokens)])
    return rng.standard_normal((tokens, 128), np.float32), ids, rng.random((tokens, K), np.float32)


def all_in_ram(pack: Pack, layer: int) -> PackedExperts:
    experts = load_experts(pack, layer, exact=False, dtype=torch.bfloat16, threads=1)
    assert isinstance(experts, PackedExperts)
    return experts


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("slots", [K, 7, EXPERTS, 2 * EXPERTS])
def test_every_budget_gives_the_bits_of_all_in_ram(pack: Pack, slots: int) -> None:
    exact = {layer: all_in_ram(pack, layer) for layer in LAYERS}
    with closing(tier_of(pack, slots)) as tier:
        for seed, tokens in enumerate([1, 1, 3, 1, 30, 1, 9, 2]):
            for layer in LAYERS:
                case = step(tokens, seed)
                assert same_bits(tier.moe(layer, *case), exact[layer].moe(*case)), (tokens, layer)
        counters = tier.counters
    asked = counters.hits + counters.misses
    assert asked > 60 and counters.misses >= min(slots, 2 * EXPERTS) and counters.nvme_bytes > 0
    assert (counters.evictions == 0) == (slots == 2 * EXPERTS)


@given(st.lists(st.tuples(st.sampled_from(LAYERS), st.integers(1, 6), st.integers(0, 99)), max_size=8))
def test_any_order_of_steps(packs: dict[str, Path], steps: list[tuple[int, int, int]]) -> None:
    with open_pack(packs["mixed"]) as pack, closing(tier_of(pack, K + 1)) as tier:
        for layer, tokens, seed in steps:
            case = step(tokens, seed)
            assert same_bits(tier.moe(layer, *case), all_in_ram(pack, layer).moe(*case))


@given(st.integers(0, 1000))
def test_outputs_are_added_in_the_order_of_experts(seed: int) -> None:
    _, ids, weights = step(3, seed)
    outputs = np.random.default_rng(seed).standard_normal((3, K, 8)).astype(np.float32)
    expected = np.zeros((3, 8), np.float32)
    for token in range(3):
        for expert in sorted(ids[token]):
            place = list(ids[token]).index(expert)
            expected[token] = expected[token] + weights[token, place] * outputs[token, place]
    assert same_bits(combine(ids, weights, outputs), expected)


def test_what_is_in_ram_is_not_read_again(pack: Pack) -> None:
    with closing(tier_of(pack, 2 * EXPERTS)) as tier:
        tier.preload(np.zeros((3, EXPERTS)))
        read = tier.counters.nvme_bytes
        assert read == sum(int(tier.expert_bytes(layer).sum()) for layer in LAYERS)
        for layer in LAYERS:
            tier.moe(layer, *step(5, layer))
        assert tier.counters.nvme_bytes == read and tier.counters.misses == 0 and tier.counters.hit_rate == 1


def test_the_hottest_are_there_at_the_start(pack: Pack) -> None:
    counts = np.zeros((3, EXPERTS), np.int64)
    counts[1, :3], counts[2, 5] = 100, 50
    told: list[tuple[int, int]] = []
    with closing(tier_of(pack, 4)) as tier:
        tier.preload(counts, lambda done, total: told.append((done, total)))
        x, _, weights = step(1, 0)
        tier.moe(1, x, np.array([[0, 1, 2, 9]]), weights)
        assert tier.counters.hits == 3 and tier.counters.misses == 1
    assert told[-1][0] == told[-1][1] > 0 and told == sorted(told)


def test_layers_take_turns_where_nothing_is_known() -> None:
    assert hottest(np.zeros((3, EXPERTS)), LAYERS)[:4] == [EXPERTS, 2 * EXPERTS, EXPERTS + 1, 2 * EXPERTS + 1]


def test_what_always_follows_is_read_ahead(packs: dict[str, Path]) -> None:
    """Two groups of experts take turns in both layers, and RAM holds little more than one layer of one group."""
    x, _, weights = step(1, 0)
    with open_pack(packs["mixed"]) as pack, closing(tier_of(pack, 2 * K)) as tier:
        for turn in range(12):
            ids = np.arange(K)[None] + K * (turn % 2)
            for layer in LAYERS:
                expected = all_in_ram(pack, layer).moe(x, ids, weights)
                assert same_bits(tier.moe(layer, x, ids, weights), expected)
        assert tier.counters.foreseen >= K


@pytest.mark.parametrize("slots", [K, 9, 2 * EXPERTS])
def test_what_a_card_has_takes_no_room(pack: Pack, slots: int) -> None:
    """Experts of even numbers are pinned: they are neither read nor kept, and the others are what they were."""
    pinned = [layer * EXPERTS + expert for layer in LAYERS for expert in range(0, EXPERTS, 2)]
    counts = np.zeros((3, EXPERTS), np.int64)
    counts[:, ::2] = 100
    exact = {layer: all_in_ram(pack, layer) for layer in LAYERS}
    with closing(NvmeTier(pack, slots * slot_bytes(pack), pinned=pinned)) as tier:
        assert tier.slots.count == min(slots, EXPERTS)
        tier.preload(counts)
        for seed in range(6):
            for layer in LAYERS:
                x, _, weights = step(2, seed)
                ids = np.stack(
                    [1 + 2 * np.random.default_rng(seed + row).permutation(EXPERTS // 2)[:K] for row in (0, 1)]
                )
                assert same_bits(tier.moe(layer, x, ids, weights), exact[layer].moe(x, ids, weights))
                assert not tier.held().flat[pinned].any()
        odd = sum(int(tier.expert_bytes(layer)[1::2].sum()) for layer in LAYERS)
        assert slots < EXPERTS or (tier.counters.nvme_bytes == odd and tier.counters.misses == 0)
        with pytest.raises(AssertionError, match="only on the card"):
            tier.moe(1, x, ids - 1, weights)


# -- faults -----------------------------------------------------------------------------------------------------------
class Drive:
    """A drive whose reads fail while `broken`."""

    def __init__(self) -> None:
        self.broken = False

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)


def test_a_failing_drive_is_said_and_nothing_is_lost_when_it_recovers(pack: Pack) -> None:
    drive, case = Drive(), step(1, 3)
    with closing(tier_of(pack, K, drive.preadv)) as tier:
        tier.moe(1, *step(1, 0))
        drive.broken = True
        with pytest.raises(CheckpointError, match=r"experts-00002.bin cannot be read at byte [\d,]+: the drive failed"):
            tier.moe(2, *case)
        drive.broken = False
        assert same_bits(tier.moe(2, *case), all_in_ram(pack, 2).moe(*case))


def test_short_reads_are_continued(pack: Pack) -> None:
    def reluctant(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(descriptor, [buffers[0][:4096]], offset)

    case = step(4, 1)
    with closing(tier_of(pack, EXPERTS, reluctant)) as tier:
        assert same_bits(tier.moe(1, *case), all_in_ram(pack, 1).moe(*case))


def damaged_copy(pack: Path, target: Path, size: int | None = None, flip: int | None = None) -> Pack:
    """Opened, verified, and only then cut to `size` bytes or changed at one of them, in the file of layer 1."""
    target.mkdir()
    for path in pack.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    opened = open_pack(target, verify=True)
    file = target / "experts-00001.bin"
    content = bytearray(file.read_bytes()[:size])
    if flip is not None:
        content[flip] ^= 1
    file.write_bytes(content)
    return opened


@pytest.mark.parametrize("name", MADE)
def test_a_file_cut_short_under_way(packs: dict[str, Path], tmp_path: Path, name: str) -> None:
    with damaged_copy(packs[name], tmp_path / "cut", size=4096) as pack, closing(tier_of(pack, K)) as tier:
        with pytest.raises(CheckpointError, match=r"experts-00001.bin is damaged: it ends before byte [\d,]+"):
            tier.moe(1, *step(1, 0))
        tier.moe(2, *step(1, 0))


@pytest.mark.parametrize("name", MADE)
def test_a_flipped_byte_is_named_where_the_pack_is_verified(packs: dict[str, Path], tmp_path: Path, name: str) -> None:
    x, _, weights = step(1, 0)
    with damaged_copy(packs[name], tmp_path / "flipped", flip=70) as pack, closing(tier_of(pack, K)) as tier:
        with pytest.raises(CheckpointError, match="layer 1 expert 0 does not have the checksum"):
            tier.moe(1, x, np.arange(K)[None], weights)
        tier.moe(1, x, np.arange(1, K + 1)[None], weights)


def test_a_budget_too_small_is_refused_with_the_sizes(pack: Pack) -> None:
    with pytest.raises(DoesNotFit, match=r"hold 3 experts of .* MB, and a token needs 4 of a layer.*At least"):
        tier_of(pack, K - 1)


# -- the whole model --------------------------------------------------------------------------------------------------
def load(path: Path, **options: object) -> Kimi:
    return Kimi.load(path, ctx=128, threads=2, **options)  # type: ignore[arg-type]


def budget(path: Path, slots: int) -> int:
    with open_pack(path) as pack:
        return slots * slot_bytes(pack)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("slots", [K, 15])
def test_a_model_answers_as_it_does_from_ram(packs: dict[str, Path], name: str, slots: int) -> None:
    path, params = packs[name], SamplingParams(temperature=0.0, max_tokens=12)
    for chunk in (7, 64):
        with load(path, prefill_chunk=chunk) as whole:
            expected = whole.logits(IDS), list(whole.generate(IDS, params))
            assert whole.expert_report()["tier"] is None
        with load(path, prefill_chunk=chunk, ram_budget=budget(path, slots)) as kimi:
            assert kimi.expert_report()["tier"]["misses"] == 0, "what loading read is not counted"
            assert torch.equal(kimi.logits(IDS), expected[0])
            assert list(kimi.generate(IDS, params)) == expected[1]
            report = kimi.expert_report()["tier"]
        assert report["slots"] == slots and report["misses"] > 0 and report["hit_rate"] < 1
        assert report["hit_rate"] > 0.3 or slots == K


def test_a_budget_for_all_needs_no_tier(packs: dict[str, Path]) -> None:
    with load(packs["mixed"], ram_budget=1 << 40) as kimi:
        assert kimi.expert_report()["tier"] is None


def test_an_error_under_way_ends_the_answer(packs: dict[str, Path]) -> None:
    """The engine raises, keeps nothing of the broken step, and answers as before once the drive does."""
    drive, params = Drive(), SamplingParams(temperature=0.0, max_tokens=30)
    with open_pack(packs["mixed"]) as pack, closing(tier_of(pack, K, drive.preadv)) as tier:
        model = Transformer(pack, Residence(torch.device("cpu"), torch.bfloat16, False, 1, tier=tier))
        engine = Engine(model, KVCache(pack.config, 128, dtype=torch.bfloat16, device=torch.device("cpu")), 64, 128)
        expected, ids = list(engine.stream(Request(IDS, params))), engine.stream(Request(IDS, params))
        assert next(ids) == expected[0]
        drive.broken = True
        with pytest.raises(KimiError, match="the drive failed"):
            list(ids)
        drive.broken = False
        assert list(engine.stream(Request(IDS, params))) == expected


def test_only_packs_have_a_budget(tiny: Path) -> None:
    with pytest.raises(UsageError, match="Only packs"):
        load(tiny, ram_budget=1 << 20)


def test_what_does_not_fit_goes_to_the_drive_by_itself(packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []

    def free(size: int) -> None:
        hardware = Hardware(ram_total=1 << 34, ram_available=size)
        monkeypatch.setattr("hybrid.model.reside.probe", lambda: hardware)

    with open_pack(packs["mixed"]) as pack:
        parts, size = pack.load_bytes(), slot_bytes(pack)
    with load(packs["mixed"]) as kimi:
        ram = kimi.placement.ram
    rest = ram.total - ram.parts["system"] - ram.parts["experts"]
    free(rest + 16 * size)
    with load(packs["mixed"], on_progress=seen.append) as kimi:
        assert K <= kimi.expert_report()["tier"]["slots"] == kimi.placement.ram_slots < 16
        assert len(list(kimi.generate(IDS, SamplingParams(max_tokens=3)))) == 3
    loaded = [each for each in seen if each.stage == "load"]
    assert loaded[-1].unit == "B" and loaded[-1].done == loaded[-1].total == parts["resident"]
    filled = [each for each in seen if each.stage == "tier"]
    assert filled[-1].done == filled[-1].total > 0 and filled[-1].unit == "B"
    free(rest - 1)
    with pytest.raises(DoesNotFit, match="are free"):
        load(packs["mixed"])
    with pytest.raises(DoesNotFit, match="are free"):
        load(packs["mixed"], ram_budget=5 * size)
