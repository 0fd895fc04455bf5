"""The cache of experts in a card's memory, with the CPU as the card: who is in which slot, and since when."""

from concurrent.futures import Future
from contextlib import nullcontext
from threading import Timer

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid.checkpoint import open_checkpoint
from hybrid.config import ModelConfig
from hybrid.errors import KimiError
from hybrid.memory.expert_cache import STAGED, CopiesAtOnce, ExpertCache, HostLayer, PinnedUploads

CPU = torch.device("cpu")
SIZE = 64


@pytest.fixture(scope="module")
def config(tiny) -> ModelConfig:
    with open_checkpoint(tiny) as checkpoint:
        return checkpoint.config


class Delayed(CopiesAtOnce):
    """Uploads whose bytes arrive when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[None], list[np.ndarray], torch.Tensor]] = []

    def begin(self, parts, target):
        done: Future[None] = Future()
        self.waiting.append((done, parts, target))
        return done

    def arrive(self, number: int = 0) -> None:
        done, parts, target = self.waiting.pop(number)
        super().begin(parts, target)
        done.set_result(None)


def blob(layer: int, expert: int) -> list[np.ndarray]:
    """An expert's bytes, in two parts that do not fill a slot."""
    return [np.full(32, layer, np.uint8), np.full(16, expert, np.uint8)]


class Host:
    """Layers of experts in RAM, and what was said of slots."""

    def __init__(self, config: ModelConfig, slots: int, uploads: CopiesAtOnce | None = None) -> None:
        self.config, self.cache = config, ExpertCache(config, slots, SIZE, CPU, uploads)
        self.said: dict[int, tuple[int, int]] = {}  # slot -> layer and expert
        for layer in config.moe_layers:
            self.cache.add(
                layer, HostLayer(lambda i, layer=layer: blob(layer, i), lambda s, e, la=layer: self.say(s, la, e))
            )

    def say(self, slot: int, layer: int, expert: int) -> None:
        self.said[slot] = layer, expert

    def use(self, layer: int, *experts: int) -> list[bool]:
        """A step's part that needs these experts; which of them a slot holds, as `note` counts them."""
        ids = torch.tensor([experts])
        slots = self.cache.split(layer, ids)[0].tolist()
        self.cache.note(layer, ids.numpy(), np.full(self.config.n_routed_experts, 48))
        for expert, slot in zip(experts, slots, strict=True):
            assert (slot == self.cache.count) == bool(self.cache.absent(layer)[expert])
            assert bool(self.cache.held()[layer, expert]) == (slot < self.cache.count)
            if slot < self.cache.count:
                assert self.said[slot] == (layer, expert)
                held = self.cache.data.view(-1, SIZE)[slot, :48]
                assert held.tolist() == [layer] * 32 + [expert] * 16, "the slot holds another expert"
        return [slot < self.cache.count for slot in slots]


def test_what_is_missed_is_here_in_the_step_after_the_next(config: ModelConfig) -> None:
    host, layer = Host(config, 4), config.moe_layers[0]
    host.cache.step()
    assert host.use(layer, 1, 2) == [False, False]
    host.cache.step()  # both set out
    assert host.use(layer, 1, 2) == [False, False]
    host.cache.step()
    assert host.use(layer, 1, 2) == [True, True]
    found = host.cache.counters
    assert (found.hits, found.misses, found.uploads, found.evictions) == (2, 4, 2, 0)
    assert (found.card_bytes, found.ram_bytes, found.upload_bytes) == (2 * 48, 4 * 48, 2 * 48)


def test_nothing_is_seen_before_it_arrived(config: ModelConfig) -> None:
    uploads, layer = Delayed(), config.moe_layers[0]
    host = Host(config, 4, uploads)
    host.use(layer, 0, 1, 2)
    for _ in range(3):
        host.cache.step()
        assert len(uploads.waiting) == STAGED, "no more than there are buffers for"
        assert not any(host.use(layer, 0, 1, 2)) and not host.said
    uploads.arrive(1)
    assert not any(host.use(layer, 0, 1, 2)), "within a step nothing changes"
    host.cache.step()
    assert host.use(layer, 0, 1, 2).count(True) == 1 and len(host.said) == 1


def test_who_gives_way_is_gone_at_once(config: ModelConfig) -> None:
    """Its slot is being written from then on; nobody may be told to read it."""
    uploads, layer = Delayed(), config.moe_layers[0]
    host = Host(config, 1, uploads)
    host.use(layer, 0)
    host.cache.step()
    uploads.arrive()
    host.cache.step()
    assert host.use(layer, 0) == [True]
    for _ in range(30):
        host.use(layer, 1)
        host.cache.step()
    assert len(uploads.waiting) == 1 and host.cache.counters.evictions == 1
    assert host.use(layer, 0, 1) == [False, False]
    uploads.arrive()
    host.cache.step()
    assert host.use(layer, 0, 1) == [False, True]


@given(st.integers(0, 20), st.lists(st.tuples(st.booleans(), st.integers(0, 2**32)), max_size=60), st.data())
def test_slots_hold_what_they_are_said_to_hold(config: ModelConfig, slots: int, steps, data) -> None:
    """Whatever is asked for and however late bytes arrive; `use` looks at every slot it is told of."""
    uploads = Delayed()
    host = Host(config, slots, uploads)
    for arrives, seed in steps:
        rng = np.random.default_rng(seed)
        host.cache.step()
        for layer in config.moe_layers:
            host.use(layer, *(rng.zipf(1.5, 3) % config.n_routed_experts).tolist())
        if arrives and uploads.waiting:
            uploads.arrive(data.draw(st.integers(0, len(uploads.waiting) - 1)))
    counters, count = host.cache.counters, host.cache.count
    assert count == min(slots, config.num_experts)
    taken = sum(int((~host.cache.absent(layer)).sum()) for layer in config.moe_layers)
    assert 0 <= counters.uploads - counters.evictions <= count and taken <= count
    if not count:
        assert counters.hits == counters.uploads == 0
    every = [host.use(layer, *range(config.n_routed_experts)) for layer in config.moe_layers]
    assert sum(map(sum, every)) == taken, "all of them looked at"


def test_a_skewed_stream_is_learnt(config: ModelConfig) -> None:
    host, rng, layers = Host(config, 2 * len(config.moe_layers)), np.random.default_rng(0), config.moe_layers
    for layer in layers:  # first a few that will not be asked for again
        host.use(layer, 6, 7)
    rates = []
    for _ in range(3):
        host.cache.counters.reset()
        for _ in range(40):
            host.cache.step()
            for layer in layers:
                host.use(layer, *([0, 1] if rng.random() < 0.9 else [2, 3]))
        rates.append(host.cache.counters.hit_rate)
    assert rates[0] < rates[2] and rates[2] > 0.8
    assert host.cache.counters.evictions < 10, "and what is rare does not push out what is not"


def test_it_begins_with_what_earlier_runs_chose(config: ModelConfig) -> None:
    counts = np.zeros((config.num_hidden_layers, config.n_routed_experts), np.int64)
    for layer in config.moe_layers:
        counts[layer, [2, 5]] = 10, 20
    host, seen = Host(config, 2 * len(config.moe_layers)), []
    host.cache.fill(counts, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(host.said) * SIZE, len(host.said) * SIZE)
    for layer in config.moe_layers:
        assert host.use(layer, 2, 5, 0) == [True, True, False]


def test_who_is_pinned_stays_and_nobody_else_comes(config: ModelConfig) -> None:
    host, layer, seen = Host(config, 6), config.moe_layers[0], []
    keys = [layer * config.n_routed_experts + expert for expert in (5, 1, 2, 7)]
    host.cache.pin(keys, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4 * SIZE, 4 * SIZE) and seen == sorted(seen)
    for _ in range(20):
        host.cache.step()
        assert host.use(layer, 0, 1, 3, 5) == [False, True, False, True]
    counters = host.cache.counters
    assert counters.uploads == 4 and counters.evictions == 0 and host.cache.held().sum() == 4


def test_what_is_read_for_the_card_is_not_all_in_ram_at_once(config: ModelConfig) -> None:
    class Counted(CopiesAtOnce):
        """Uploads that end when the next ones must wait for them."""

        def __init__(self) -> None:
            self.under_way, self.most = 0, 0

        def begin(self, parts, target):
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            done: Future[None] = Future()

            def arrive() -> None:
                self.under_way -= 1
                done.set_result(super(Counted, self).begin(parts, target).result())

            Timer(0.01, arrive).start()
            return done

    uploads = Counted()
    host = Host(config, 9, uploads)
    first = config.moe_layers[0] * config.n_routed_experts
    host.cache.pin(range(first, first + 8))
    assert uploads.most == STAGED and uploads.under_way == 0
    assert all(host.use(config.moe_layers[0], *range(8)))


def test_no_slots(config: ModelConfig) -> None:
    host = Host(config, 0)
    host.cache.fill(np.ones((config.num_hidden_layers, config.n_routed_experts), np.int64))
    for _ in range(3):
        host.cache.step()
        assert host.use(config.moe_layers[0], 0, 1) == [False, False]
    assert host.cache.counters.uploads == 0 and not host.said


def test_more_slots_than_experts_are_not_taken(config: ModelConfig) -> None:
    host = Host(config, 10_000)
    assert host.cache.count == config.num_experts
    host.cache.fill(np.zeros((config.num_hidden_layers, config.n_routed_experts), np.int64))
    assert all(all(host.use(layer, *range(config.n_routed_experts))) for layer in config.moe_layers)


class Recorded:
    """A stream, and the whole of torch.cuda that uploads use, which only writes down what is asked of it."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def stream(self, name: str) -> "Stream":
        return Stream(self, name)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **more: empty(*shape, **more))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream("own"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream("kernels"))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: "asleep" if blocking else "awake")


class Stream:
    def __init__(self, record: Recorded, name: str) -> None:
        self.record, self.name = record, name

    def record_event(self, event: str = "") -> "Stream":
        self.record.said.append(f"{self.name}: event {event}".strip())
        return self

    def wait_event(self, event: "Stream") -> None:
        self.record.said.append(f"{self.name}: wait for {event.name}")

    def synchronize(self) -> None:
        self.record.said.append(f"host: wait for {self.name}")


def test_pinned_uploads_keep_the_order_that_makes_them_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not CUDA itself, which this cannot run: the copy waits for kernels begun before, and "done" for the copy."""
    record = Recorded()
    record.install(monkeypatch)
    uploads, target = PinnedUploads(torch.device("cuda"), SIZE), torch.zeros(SIZE, dtype=torch.uint8)
    for expert in range(5):  # more than there are buffers
        record.said.clear()
        uploads.begin(blob(3, expert), target).result()
        assert record.said == ["kernels: event", "own: wait for kernels", "own: event asleep", "host: wait for own"]
        assert target.tolist() == [3] * 32 + [expert] * 16 + [0] * 16
    uploads.close()


def test_a_failed_upload_says_what_to_do(config: ModelConfig) -> None:
    uploads = Delayed()
    host = Host(config, 1, uploads)
    host.use(config.moe_layers[0], 3)
    host.cache.step()
    uploads.waiting[0][0].set_exception(RuntimeError("CUDA error: the bus fell off"))
    with pytest.raises(KimiError, match="the bus fell off.*--gpu-experts 0"):
        host.cache.step()
