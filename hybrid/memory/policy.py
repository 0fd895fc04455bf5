"""Which experts stay in a cache's slots: policies that decide as they go, and the optimum that knows the future.

An access is one layer of one step: the layer and the distinct experts it needs. A policy answers which of them were
missing and which slots to refill. It may leave a missing expert outside: what is missing is computed elsewhere (on the
CPU, from RAM) or read into a buffer, so a slot is only worth changing for something that will be used sooner.

    LRU        the least recently used goes; every missing expert comes in
    Frequency  the one with the lowest decayed count of uses goes; what has an even lower count stays outside
    Foresight  the same with the probability of use in the next step, predicted; the default

Foresight keeps four decayed counts of each expert, with half-lives from one step to a thousand, and predicts by their
best linear combination, fitted while it runs. So it acts as LRU where experts follow each other from token to token, as
a count where some are popular, and as both where both is true. `worth` makes it aware of cost: what a hit saves.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np

NEVER = 1 << 60
HALF_LIVES = (0.2, 10.0, 100.0, 1000.0)  # steps; the first remembers the last step alone
LEARN_EVERY = 7  # accesses; learning from each would take longer than all the rest
MEMORY = 400.0  # steps after which an observation weighs half


class Access(NamedTuple):
    """What one access found and changed."""

    misses: np.ndarray  # int64, experts that were in no slot
    swaps: list[tuple[int, int]]  # (key that comes in, key whose slot it takes or -1 for an empty one)


class Policy(Protocol):
    """Keys are layer * experts + expert. `access` keeps the cache's contents; the caller moves the bytes."""

    def access(self, layer: int, ids: np.ndarray) -> Access:
        """`ids` int64 [n], distinct experts that `layer` needs now."""
        ...


class LRU:
    """The least recently used expert makes room."""

    def __init__(self, layers: int, experts: int, capacity: int) -> None:
        self.experts, self.capacity = experts, capacity
        self.slots: OrderedDict[int, None] = OrderedDict()

    def access(self, layer: int, ids: np.ndarray) -> Access:
        keys = (ids + layer * self.experts).tolist()
        missing = [key for key in keys if key not in self.slots]
        for key in keys:
            if key in self.slots:
                self.slots.move_to_end(key)
        swaps = [(key, self._insert(key)) for key in missing] if self.capacity else []
        return Access(np.array(missing, np.int64) - layer * self.experts, swaps)

    def _insert(self, key: int) -> int:
        evicted = self.slots.popitem(last=False)[0] if len(self.slots) == self.capacity else -1
        self.slots[key] = None
        return evicted


class Scored:
    """Slots for the keys with the highest scores; what the scores are is the subclass's."""

    def __init__(self, layers: int, experts: int, capacity: int, margin: float = 0.0) -> None:
        """A newcomer must beat the weakest by `margin`, which saves uploads that would hardly pay."""
        self.experts, self.capacity, self.margin = experts, capacity, margin
        self.scores = np.zeros(layers * experts)
        self.resident = np.zeros(layers * experts, bool)
        self.slots = np.empty(capacity, np.int64)
        self.used = 0

    def note(self, layer: int, ids: np.ndarray) -> None:
        """Update `scores` of a layer whose experts `ids` are used now."""
        raise NotImplementedError

    def access(self, layer: int, ids: np.ndarray) -> Access:
        keys = ids + layer * self.experts
        missing = keys[~self.resident[keys]]
        self.note(layer, ids)
        return Access(missing - layer * self.experts, self._admit(missing) if missing.size and self.capacity else [])

    def _admit(self, keys: np.ndarray) -> list[tuple[int, int]]:
        room = min(keys.size, self.capacity - self.used)
        swaps = [self._place(int(key), self.used + i) for i, key in enumerate(keys[:room])]
        self.used += room
        rest = keys[room:]
        return swaps + self._replace(rest) if rest.size else swaps

    def _replace(self, keys: np.ndarray) -> list[tuple[int, int]]:
        """The best of `keys` against the weakest residents, pair by pair."""
        standing = self.scores[self.slots]
        pairs = min(keys.size, self.capacity)
        weakest = np.argpartition(standing, pairs - 1)[:pairs]
        weakest = weakest[np.argsort(standing[weakest])]
        best = keys[np.argsort(-self.scores[keys])][:pairs]
        better = self.scores[best] > standing[weakest] + self.margin
        return [self._place(int(key), int(slot)) for key, slot in zip(best[better], weakest[better], strict=True)]

    def _place(self, key: int, slot: int) -> tuple[int, int]:
        evicted = int(self.slots[slot]) if slot < self.used else -1
        if evicted >= 0:
            self.resident[evicted] = False
        self.slots[slot] = key
        self.resident[key] = True
        return key, evicted


class Frequency(Scored):
    """Uses counted with a half-life of `half_life` steps."""

    def __init__(self, layers: int, experts: int, capacity: int, margin: float = 0.0, half_life: float = 50.0) -> None:
        super().__init__(layers, experts, capacity, margin)
        self.keep = 0.5 ** (1 / half_life)

    def note(self, layer: int, ids: np.ndarray) -> None:
        row = self.scores[layer * self.experts : (layer + 1) * self.experts]
        row *= self.keep
        row[ids] += 1 - self.keep


class Foresight(Scored):
    """Predicted probability of use in the next step, times what a hit there is worth."""

    def __init__(
        self, layers: int, experts: int, capacity: int, margin: float = 0.0, worth: np.ndarray | None = None
    ) -> None:
        """`worth` [layers, experts]: what a hit saves per byte of its slot, in any unit; default alike."""
        super().__init__(layers, experts, capacity, margin)
        self.worth = worth
        self.keep = 0.5 ** (1 / np.array(HALF_LIVES))[:, None]
        terms = len(HALF_LIVES)
        self.decayed = np.zeros((layers, terms, experts))  # counts of uses
        self.whole = np.zeros((layers, terms, 1))  # what they would be had an expert always been used
        # Normal equations of (used now) ~ weights . rates, from a prior that all rates count alike.
        self.products, self.sums = np.eye(terms), np.full(terms, 1 / terms)
        self.weights = np.full(terms, 1 / terms)
        self.forget = 0.5 ** (LEARN_EVERY / (MEMORY * layers))
        self.accesses = 0

    def note(self, layer: int, ids: np.ndarray) -> None:
        decayed, whole = self.decayed[layer], self.whole[layer]
        self.accesses += 1
        if self.accesses % LEARN_EVERY == 0:
            self._learn(decayed / np.maximum(whole, 1e-9), ids)
        decayed *= self.keep
        decayed[:, ids] += 1
        whole *= self.keep
        whole += 1
        scores = (self.weights / whole[:, 0]) @ decayed
        self.scores[layer * self.experts : (layer + 1) * self.experts] = (
            scores if self.worth is None else scores * self.worth[layer]
        )

    def expect(self, odds: np.ndarray) -> None:
        """Begin as if experts had long been used in `odds` [layers, experts] of the steps; zeros for a layer of which
        nothing is known."""
        known = odds.any(axis=1)
        self.whole[known] = 1 / (1 - self.keep)
        self.decayed[:] = odds[:, None] * self.whole
        self.scores[:] = odds.reshape(-1)

    def _learn(self, rates: np.ndarray, ids: np.ndarray) -> None:
        """Refit the weights with what the rates of before say about the uses of now."""
        self.products = self.products * self.forget + rates @ rates.T
        self.sums = self.sums * self.forget + rates[:, ids].sum(axis=1)
        self.weights = np.linalg.solve(self.products + 1e-6 * np.eye(len(self.sums)), self.sums)


POLICIES = {"lru": LRU, "frequency": Frequency, "foresight": Foresight}


def misses(trace: np.ndarray, policy: Policy) -> np.ndarray:
    """int64 [steps, layers]: experts of `trace` [steps, layers, k] that `policy` did not have."""
    counts = [[policy.access(layer, ids).misses.size for layer, ids in enumerate(step)] for step in trace]
    return np.array(counts, np.int64)


def belady_misses(trace: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    """The least misses any policy can have, counted as `misses` does: what is used latest again stays outside."""
    steps, layers, k = trace.shape
    keys = (trace + np.arange(layers)[:, None] * experts).ravel()
    missed = _belady(keys.tolist(), _next_uses(keys), capacity)
    return np.array(list(missed), np.int64).reshape(steps, layers, k).sum(axis=2)


def _next_uses(keys: np.ndarray) -> list[int]:
    """For each place in `keys`, the place where the same key stands next."""
    order = np.argsort(keys, kind="stable")
    following = np.full(keys.size, NEVER)
    same = keys[order[:-1]] == keys[order[1:]]
    following[order[:-1][same]] = order[1:][same]
    return following.tolist()


def _belady(keys: list[int], next_uses: list[int], capacity: int) -> Iterable[bool]:
    due: dict[int, int] = {}  # resident key -> its next use
    latest: list[tuple[int, int]] = []  # (-next use, key), with entries that no longer hold
    for key, following in zip(keys, next_uses, strict=True):
        yield key not in due
        due[key] = following
        heapq.heappush(latest, (-following, key))
        while len(due) > capacity:
            use, last = heapq.heappop(latest)
            if due.get(last) == -use:
                del due[last]
