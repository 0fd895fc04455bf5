"""The NVMe tier: experts beyond the RAM budget stay in the pack's files and are read when a step asks for them.

RAM holds as many experts as the budget allows, of all layers together, but none of those that a card has. A layer first
has every expert it lacks read, all at once and past the page cache, each into the slot of one that is wanted less; what
is in RAM is multiplied meanwhile, and what arrives as it arrives. Experts that mostly followed the chosen ones are read
ahead for the next layer. Nothing of this shows in the result: each expert's output is kept apart, and they are added as
the kernels add.
"""

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

from hybrid.checkpoint.pack import Pack
from hybrid.errors import CheckpointError, DoesNotFit
from hybrid.memory.direct import READERS, DirectFile, Preadv
from hybrid.memory.many import NOBODY, ManyTokens
from hybrid.memory.residents import Following, Residents
from hybrid.memory.router_stats import TierCounters, odds
from hybrid.memory.slots import open_slots, slot_bytes

FEW = 4  # tokens up to which one layer's experts foretell the next one's
GIB = 1 << 30

OnBytes = Callable[[int, int], None]  # told the bytes done, and of how many


class NvmeTier:
    """The routed experts of a pack, some in RAM and all on the drive. Used from one thread at a time."""

    def __init__(
        self,
        pack: Pack,
        budget: int,
        *,
        pinned: Collection[int] = (),
        preadv: Preadv = os.preadv,
        many: ManyTokens | None = None,
    ) -> None:
        """`budget` bytes of RAM; experts with keys `pinned` are a card's and not asked for; `preadv` does the reading,
        and `many` multiplies experts that have many tokens.

        Raises DoesNotFit when the budget will not hold what one token needs of a layer.
        """
        config, self.slot_bytes = pack.config, slot_bytes(pack)
        require_room(budget, self.slot_bytes, config.num_experts_per_tok)
        self._pinned = frozenset(pinned)
        self.slots = open_slots(pack, min(config.num_experts - len(self._pinned), budget // self.slot_bytes))
        self.counters = TierCounters()
        self._many = many
        self._pack, self._layers, self._experts = pack, config.moe_layers, config.n_routed_experts
        records = {layer: pack.manifest.layers[layer] for layer in self._layers}
        self._files = {layer: DirectFile(pack.path / record.file, preadv) for layer, record in records.items()}
        self._sizes = {layer: self.expert_bytes(layer).tolist() for layer in self._layers}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="nvme")
        self._reading: dict[int, Future[None]] = {}  # by key; its slot is taken
        self._residents = Residents(config.num_hidden_layers, self._experts, self.slots.count)
        self._following = Following(config.num_hidden_layers, self._experts)
        self._last = (-1, np.zeros(0, np.int64))  # the layer before, and what it chose

    def expert_bytes(self, layer: int) -> np.ndarray:
        """int64 [experts], as `LayerExperts` has it."""
        return np.array([sum(self._pack.shapes.sizes(each)) for each in self._pack.manifest.layers[layer].formats])

    def held(self) -> np.ndarray:
        """bool [layers, experts]: which are in RAM or on the way there. Any thread may ask."""
        return self._residents.held()

    def close(self) -> None:
        """Wait for the reads under way and let go of the files."""
        self._readers.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()

    def preload(self, counts: np.ndarray, on_bytes: OnBytes = lambda done, total: None) -> None:
        """Fill the slots with the experts of the highest `counts` [layers, experts].

        Raises CheckpointError when one cannot be read.
        """
        self._residents.expect(odds(counts, self._pack.config.num_experts_per_tok))
        keys = [key for key in hottest(counts, self._layers) if key not in self._pinned][: self.slots.count]
        wanted, begun, done, total = set(keys), 0, 0, self._bytes_of(keys)
        while begun < len(keys) or self._reading:
            begun += len(self._begin(keys[begun : begun + 2 * READERS - len(self._reading)], wanted))
            done += self._bytes_of(self._arrived(wanted))
            on_bytes(done, total)

    def moe(self, layer: int, x: np.ndarray, topk_ids: np.ndarray, topk_weights: np.ndarray) -> np.ndarray:
        """The layer's routed experts, to the bit as if all were in RAM; arguments as `quant.kernels.moe` has them.

        Raises CheckpointError when an expert cannot be read or, in a verified pack, is not what it should be.
        """
        tokens, k = topk_ids.shape
        chosen, which = np.unique(topk_ids, return_inverse=True)
        which = which.reshape(-1)
        ahead = self._foresee(layer, chosen) if tokens <= FEW else []
        self._residents.note(layer, chosen)
        formats = self._pack.manifest.layers[layer].formats
        apart = NOBODY if self._many is None else self._many.chosen(formats, topk_ids)
        out = np.empty((tokens * k, x.shape[1]), np.float32)
        keys = (layer * self._experts + chosen).tolist()
        assert self._pinned.isdisjoint(keys), "an expert that is only on the card"
        for group in self._groups(keys, ahead):
            experts = np.array(group) % self._experts
            if apart.size:
                crowded = np.isin(experts, apart)
                self._multiply_many(layer, experts[crowded], x, topk_ids, out)
                experts = experts[~crowded]
            place = np.full(len(chosen), -1)
            place[np.searchsorted(chosen, experts)] = np.arange(len(experts))
            pairs = np.flatnonzero(place[which] >= 0)
            if pairs.size:
                slots = np.array([self._residents.slot_of[key] for key in (layer * self._experts + experts).tolist()])
                out[pairs] = self.slots.multiply(layer, slots, x[pairs // k], place[which[pairs]])
        if apart.size:  # they come last, as `ManyTokens.moe` adds
            topk_ids = topk_ids + self._experts * np.isin(topk_ids, apart)
        return combine(topk_ids, topk_weights, out.reshape(tokens, k, -1))

    def _multiply_many(
        self, layer: int, experts: np.ndarray, x: np.ndarray, topk_ids: np.ndarray, out: np.ndarray
    ) -> None:
        """out [pairs, hidden] of those pairs whose expert, which is in RAM, `many` multiplies."""
        for expert in experts.tolist():
            assert self._many is not None
            pairs = np.flatnonzero(topk_ids == expert)
            slot = self._residents.slot_of[layer * self._experts + expert]
            out[pairs] = self._many.outputs(self.slots.experts(layer), slot, x[pairs // topk_ids.shape[1]])

    # -- who is in RAM ----------------------------------------------------------------------------------------------
    def _groups(self, keys: list[int], ahead: list[int]) -> Iterator[list[int]]:
        """`keys` in groups as they come to lie in RAM, what is there first; asking for the next lets go of a group.

        Once no read of `keys` is left to begin, those `ahead` follow.
        """
        self._recall({*keys, *ahead})
        self._ended(())
        here = [key for key in keys if key in self._residents.slot_of and key not in self._reading]
        self._count(keys, here)
        needed = set(keys)
        while needed:
            lacking = [key for key in keys if key in needed and key not in self._residents.slot_of]
            kept = needed | self._reading.keys()
            self._begin(lacking, kept)
            if ahead and all(key in self._residents.slot_of for key in needed):
                absent = [key for key in ahead if key not in self._residents.slot_of]
                self.counters.foreseen += len(self._begin(absent, {*kept, *ahead, *self._reading}))
                ahead = []
            if not here:
                here = self._arrived(needed)
                continue
            yield here
            needed.difference_update(here)
            here = []

    def _foresee(self, layer: int, chosen: np.ndarray) -> list[int]:
        """Keys of the next layer that are likely to be asked for; learns from what this one was asked for."""
        before, earlier = self._last
        self._last = (layer, chosen)
        if before == layer - 1:
            self._following.learn(before, earlier, chosen)
        if layer + 1 not in self._files:
            return []
        likely = ((layer + 1) * self._experts + self._following.likely(layer, chosen)).tolist()
        return [key for key in likely if key not in self._pinned]

    def _recall(self, wanted: set[int]) -> None:
        """Give up reads of others that have not begun."""
        for key in [key for key in self._reading if key not in wanted]:
            if self._reading[key].cancel():
                del self._reading[key]
                self._residents.drop(key)

    def _count(self, keys: list[int], here: list[int]) -> None:
        self.counters.hits += len(here)
        self.counters.misses += len(keys) - len(here)
        self.counters.ram_bytes += self._bytes_of(here)

    def _bytes_of(self, keys: Sequence[int]) -> int:
        return sum(self._sizes[key // self._experts][key % self._experts] for key in keys)

    # -- reading ----------------------------------------------------------------------------------------------------
    def _begin(self, keys: Sequence[int], kept: Collection[int]) -> list[int]:
        """Read as many of `keys` as there is room for without the `kept` giving way; returns those."""
        before = len(self._residents.slot_of)
        begun = self._residents.admit(keys, kept)
        self.counters.evictions += before + len(begun) - len(self._residents.slot_of)
        for key in begun:
            layer, expert = divmod(key, self._experts)
            slot, formats = self._residents.slot_of[key], self._pack.manifest.layers[layer].formats[expert]
            self.slots.fill(slot, formats)
            self._reading[key] = self._readers.submit(self._read, layer, expert, self.slots.targets(slot, formats))
        return begun

    def _read(self, layer: int, expert: int, targets: list[np.ndarray]) -> None:
        self._files[layer].read(int(self._pack.manifest.layers[layer].offsets[expert]), targets)
        if self._pack.verify:
            self._pack.require_checksum(layer, expert, targets)

    def _arrived(self, needed: Collection[int]) -> list[int]:
        """Wait until a read ends, and return those of `needed` that are in RAM now and were not before."""
        assert self._reading, "nothing to wait for"
        start = time.perf_counter()
        wait(self._reading.values(), return_when=FIRST_COMPLETED)
        self.counters.stall_s += time.perf_counter() - start
        return self._ended(needed)

    def _ended(self, needed: Collection[int]) -> list[int]:
        """Take note of reads that ended; returns those of `needed`, and raises the error of one of them that failed.

        An expert that nobody needs now may have failed: it is read again when it is asked for.
        """
        ended = [key for key, future in self._reading.items() if future.done()]
        errors = {key: self._reading.pop(key).exception() for key in ended}
        for key in ended:
            if errors[key] is None:
                self.counters.nvme_bytes += self._bytes_of([key])
            else:
                self._residents.drop(key)
        for key in ended:
            error = errors[key]
            if error is not None and (key in needed or not isinstance(error, CheckpointError)):
                raise error
        return [key for key in ended if key in needed]


def combine(topk_ids: np.ndarray, topk_weights: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Sum of weighted outputs fp32 [tokens, k, hidden] -> [tokens, hidden], in ascending order of a token's experts.

    That is the kernels' order, and like theirs every step is rounded to fp32.
    """
    tokens = np.arange(len(outputs))
    total = np.zeros((len(outputs), outputs.shape[2]), np.float32)
    for column in np.argsort(topk_ids, axis=1).T:
        total += topk_weights[tokens, column, None] * outputs[tokens, column]
    return total


def hottest(counts: np.ndarray, layers: Sequence[int]) -> list[int]:
    """Keys of all experts of `layers`, the highest of `counts` [layers, experts] first; layers take turns at ties."""
    experts = counts.shape[1]
    keys = [layer * experts + expert for expert in range(experts) for layer in layers]
    return sorted(keys, key=lambda key: -counts[key // experts, key % experts])


def require_room(budget: int, size: int, needed: int) -> None:
    """Raise DoesNotFit unless `budget` bytes hold `needed` experts of `size` bytes."""
    if budget // size < needed:
        raise DoesNotFit(
            f"{budget / GIB:.2f} GiB of RAM hold {budget // size:,} experts of {size / 1e6:.1f} MB, and a token needs "
            f"{needed:,} of a layer at once.",
            f"At least {needed * size / GIB:.2f} GiB are needed; the more there is, the less is read from the drive.",
        )
