"""Hot experts in a card's memory: which slot holds which, who comes in, and how bytes get there while steps run.

Where RAM holds every expert, a slot holds a copy of one. Between two steps, those that were missed and will be wanted
more than the weakest in a slot set out, two at a time. They travel on threads and a stream of their own, through pinned
memory, and count as here from the first step after they arrived: so no step ever waits for one, and a slow link makes
the cache adapt later and nothing else. Where RAM does not hold them all, experts are pinned instead: they are put into
slots once, and are nowhere else.

The device is a parameter: on a CPU, which is how tests run it, copies are made at once. `PinnedUploads` needs CUDA and
is the one part that runs nowhere else.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hybrid.config import ModelConfig
from hybrid.errors import KimiError
from hybrid.memory.policy import Foresight
from hybrid.memory.router_stats import CacheCounters, odds
from hybrid.memory.tiers import OnBytes, hottest

STAGED = 2  # experts on their way at the same time, each in a pinned buffer of its own
MARGIN = 0.02  # by which a newcomer's odds must be higher: reading, staging and sending one costs several misses


class Uploads(Protocol):
    """How bytes get into the memory of a device."""

    def begin(self, parts: Sequence[np.ndarray], target: Tensor) -> Future[None]:
        """Copy `parts`, uint8 in RAM, one behind the other to `target`; done when work started later will see them.

        Work that was started on the device earlier still sees what the target held.
        """
        ...

    def close(self) -> None:
        """Wait for what is under way."""
        ...


class CopiesAtOnce:
    """Uploads to the memory that the host computes from itself."""

    def begin(self, parts: Sequence[np.ndarray], target: Tensor) -> Future[None]:
        _gather(parts, target.numpy())
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def close(self) -> None:
        pass


class PinnedUploads:
    """Uploads to a CUDA device, by threads with a pinned buffer each, on a stream that no kernel waits for."""

    def __init__(self, device: torch.device, size: int) -> None:
        """`size` bytes are the most that is copied at once."""
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._buffers: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(STAGED):
            self._buffers.put(torch.empty(size, dtype=torch.uint8, pin_memory=True))
        self._threads = ThreadPoolExecutor(STAGED, thread_name_prefix="upload")

    def begin(self, parts: Sequence[np.ndarray], target: Tensor) -> Future[None]:
        # Kernels that may read what the target held were all started before this event, and the copy waits for it.
        before = torch.cuda.current_stream(self._device).record_event()
        return self._threads.submit(self._copy, parts, target, before)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _copy(self, parts: Sequence[np.ndarray], target: Tensor, before: torch.cuda.Event) -> None:
        buffer = self._buffers.get()
        try:
            size = _gather(parts, buffer.numpy())
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(before)
                target[:size].copy_(buffer[:size], non_blocking=True)
                # Waiting here, asleep, means that whoever is told "done" starts kernels after the bytes have arrived.
                self._stream.record_event(torch.cuda.Event(blocking=True)).synchronize()
        finally:
            self._buffers.put(buffer)


def _gather(parts: Sequence[np.ndarray], target: np.ndarray) -> int:
    """Copy `parts` one behind the other to uint8 `target`; returns their bytes."""
    start = 0
    for part in parts:
        np.copyto(target[start : start + part.size], part)  # lets other threads run
        start += part.size
    return start


class HostLayer(NamedTuple):
    """What the cache must know of a layer whose experts it may hold."""

    parts: Callable[[int], list[np.ndarray]]  # an expert's bytes, uint8, as they are to lie in a slot
    placed: Callable[[int, int], None]  # told (slot, expert) once those are there


class ExpertCache:
    """Up to `count` experts, of any layer, in the memory of `device`. Used from one thread at a time.

    Slots are numbered from 0; the number `count` stands for none. An expert goes by its key, layer * experts + number.
    """

    def __init__(
        self, config: ModelConfig, slots: int, slot_bytes: int, device: torch.device, uploads: Uploads | None = None
    ) -> None:
        """Takes the memory: `slots` times `slot_bytes`, which the largest expert fits in, or less for fewer experts.

        Raises torch.OutOfMemoryError when the device has not got it.
        """
        self.count, self.slot_bytes = max(0, min(slots, config.num_experts)), slot_bytes
        self.data = torch.empty(self.count * slot_bytes, dtype=torch.uint8, device=device)
        self.counters = CacheCounters()
        self._per_token, self._experts = config.num_experts_per_tok, config.n_routed_experts
        self._uploads = uploads or (PinnedUploads(device, slot_bytes) if device.type == "cuda" else CopiesAtOnce())
        self._layers: dict[int, HostLayer] = {}
        self._slot_of = torch.full((config.num_hidden_layers, self._experts), self.count)
        self._seen = self._slot_of.numpy()  # the same memory
        self._key_of = np.full(self.count, -1)  # -1: free, or about to be filled
        self._free = list(range(self.count - 1, -1, -1))
        self._arriving: dict[Future[None], tuple[int, int]] = {}  # key and slot
        self._missed: set[int] = set()  # since the last step began
        self.pinned = False  # whether who is in a slot stays there
        self._policy = Foresight(config.num_hidden_layers, self._experts, capacity=0)  # only its scores are used

    def add(self, layer: int, host: HostLayer) -> None:
        """From now on experts of `layer` may come in."""
        self._layers[layer] = host

    def close(self) -> None:
        """Wait for the uploads under way."""
        self._uploads.close()

    # -- while a step runs ------------------------------------------------------------------------------------------
    def split(self, layer: int, topk_ids: Tensor) -> Tensor:
        """The slots of experts `topk_ids` int64 [tokens, k] of `layer`, both on the host; `count` for those in none."""
        return self._slot_of[layer].take(topk_ids)

    def absent(self, layer: int) -> np.ndarray:
        """Which experts of `layer` are in no slot: bool [experts]."""
        return self._seen[layer] == self.count

    def held(self) -> np.ndarray:
        """bool [layers, experts]: which are in a slot. Any thread may ask."""
        return self._seen != self.count

    def note(self, layer: int, topk_ids: np.ndarray, expert_bytes: np.ndarray) -> None:
        """A step uses the experts `topk_ids` [tokens, k] of `layer` now; `expert_bytes` int64 [experts], their sizes.

        Between two steps an expert is where it is: what is noted here is what `split` says in the same step.
        """
        chosen = np.unique(topk_ids)
        absent = self.absent(layer)[chosen]
        here, missed = chosen[~absent], chosen[absent]
        self.counters.hits += here.size
        self.counters.misses += missed.size
        self.counters.card_bytes += int(expert_bytes[here].sum())
        self.counters.ram_bytes += int(expert_bytes[missed].sum())
        if self.pinned:
            return
        self._policy.note(layer, chosen)
        self._missed.update((layer * self._experts + missed).tolist())

    # -- between two steps ------------------------------------------------------------------------------------------
    def step(self) -> None:
        """A new step begins: use what has arrived, and send for what the last one missed. Waits for nothing.

        Raises KimiError if an upload failed.
        """
        self._take(future for future in list(self._arriving) if future.done())
        if self.count and not self.pinned:
            self._send(self._missed, STAGED - len(self._arriving))
        self._missed.clear()

    def fill(self, counts: np.ndarray, on_bytes: OnBytes = lambda done, total: None) -> None:
        """Fill empty slots with experts of the highest `counts` [layers, experts], and wait until they are there."""
        self._policy.expect(odds(counts, self._per_token))
        keys = [key for key in hottest(counts, list(self._layers)) if self._seen.flat[key] == self.count]
        self._bring(keys[: len(self._free)], on_bytes)

    def pin(self, keys: Sequence[int], on_bytes: OnBytes = lambda done, total: None) -> None:
        """Put the experts `keys` into slots, at most as many as there are, and leave it at that; waits until they are
        there. Raises KimiError if an upload fails, and what reading one raises."""
        self.pinned = True
        self._bring(keys, on_bytes)

    def _bring(self, keys: Sequence[int], on_bytes: OnBytes) -> None:
        """Fill free slots. No more experts are under way than travel at once: each may be in RAM for that alone."""
        done, total = 0, len(keys) * self.slot_bytes
        for key in keys:
            if len(self._arriving) == STAGED:
                self._await()
            self._begin(key, self._free.pop())
            done += self.slot_bytes
            on_bytes(done - len(self._arriving) * self.slot_bytes, total)
        while self._arriving:
            self._await()
            on_bytes(done - len(self._arriving) * self.slot_bytes, total)

    def _await(self) -> None:
        self._take(wait(self._arriving, return_when=FIRST_COMPLETED).done)

    def _send(self, missed: Iterable[int], most: int) -> None:
        """Begin to upload the best of `missed`, up to `most`, as far as they find room or beat who has it."""
        scores, on_the_way = self._policy.scores, {key for key, _ in self._arriving.values()}
        absent = [key for key in missed if key not in on_the_way and self._seen.flat[key] == self.count]
        best = sorted(absent, key=lambda key: -scores[key])[:most]
        for key in best:
            slot = self._free.pop() if self._free else self._weakest(scores[key] - MARGIN)
            if slot is None:
                return
            self._begin(key, slot)

    def _weakest(self, below: float) -> int | None:
        """Empty and return the slot of the expert that is wanted least, if its score is `below` that."""
        held = np.flatnonzero(self._key_of >= 0)
        if not held.size:
            return None
        standing = self._policy.scores[self._key_of[held]]
        least = int(standing.argmin())
        if standing[least] >= below:
            return None
        slot = int(held[least])
        self._seen.flat[self._key_of[slot]] = self.count
        self._key_of[slot] = -1
        self.counters.evictions += 1
        return slot

    def _begin(self, key: int, slot: int) -> None:
        layer, expert = divmod(key, self._experts)
        parts = self._layers[layer].parts(expert)
        target = self.data[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]
        size = sum(part.size for part in parts)
        assert size <= self.slot_bytes, (size, self.slot_bytes)
        self.counters.uploads += 1
        self.counters.upload_bytes += size
        self._arriving[self._uploads.begin(parts, target)] = key, slot

    def _take(self, done: Iterable[Future[None]]) -> None:
        """From now on `split` finds what these uploads brought."""
        for future in done:
            key, slot = self._arriving.pop(future)
            try:
                future.result()
            except RuntimeError as error:
                raise KimiError(f"Copying an expert to the card failed: {error}", "Try --gpu-experts 0.") from error
            layer, expert = divmod(key, self._experts)
            self._layers[layer].placed(slot, expert)
            self._key_of[slot] = key
            self._seen[layer, expert] = slot
