"""Which experts lie in which slots of RAM, who gives way to whom, and who is likely to be asked for next.

An expert goes by its key, layer * experts + number.
"""

from collections.abc import Collection, Sequence

import numpy as np

from hybrid.memory.policy import Foresight

LIKELY = 0.5  # share of past steps in which an expert must have followed the chosen ones to be read ahead


class Residents:
    """Experts in slots, each in one; where room is needed, those give way that will be wanted least.

    The policy says who that is. Which are in RAM is decided here, because an expert that is being read or waits to be
    multiplied cannot leave, and each one that is needed must come in, if only to be the first to go.
    """

    def __init__(self, layers: int, experts: int, slots: int) -> None:
        self.slot_of: dict[int, int] = {}
        self._shape = layers, experts
        self._key_of = np.full(slots, -1)
        self._free = list(range(slots - 1, -1, -1))
        self._policy = Foresight(layers, experts, capacity=0)

    def expect(self, odds: np.ndarray) -> None:
        """Begin with experts used in `odds` [layers, experts] of the steps."""
        self._policy.expect(odds)

    def held(self) -> np.ndarray:
        """bool [layers, experts]: who has a slot, whether it is filled yet or not. Any thread may ask."""
        held, keys = np.zeros(self._shape, bool), self._key_of.copy()
        held.flat[keys[keys >= 0]] = True
        return held

    def note(self, layer: int, chosen: np.ndarray) -> None:
        """These experts are used now."""
        self._policy.note(layer, chosen)

    def admit(self, keys: Sequence[int], kept: Collection[int]) -> list[int]:
        """Give slots to the first of `keys`, as many as can have one while the `kept` keep theirs; returns those."""
        if len(keys) > len(self._free):
            self._evict(len(keys) - len(self._free), kept)
        admitted = list(keys[: len(self._free)])
        for key in admitted:
            slot = self.slot_of[key] = self._free.pop()
            self._key_of[slot] = key
        return admitted

    def drop(self, key: int) -> None:
        """The slot of `key` holds nothing."""
        slot = self.slot_of.pop(key)
        self._key_of[slot] = -1
        self._free.append(slot)

    def _evict(self, count: int, kept: Collection[int]) -> None:
        movable = self._key_of >= 0
        movable[[self.slot_of[key] for key in kept if key in self.slot_of]] = False
        keys = self._key_of[movable]
        if count < keys.size:
            keys = keys[np.argpartition(self._policy.scores[keys], count)[:count]]
        for key in keys.tolist():
            self.drop(key)


class Following:
    """Which experts were chosen in the layer after others, one step like another: what reading ahead goes by."""

    def __init__(self, layers: int, experts: int) -> None:
        self._times = np.zeros((layers, experts), np.float32)
        self._followed = np.zeros((layers, experts, experts), np.float32)  # 35 MB for K2.5

    def learn(self, layer: int, chosen: np.ndarray, then: np.ndarray) -> None:
        """After the experts `chosen` in `layer` came `then` in the next."""
        self._times[layer, chosen] += 1
        self._followed[layer][np.ix_(chosen, then)] += 1

    def likely(self, layer: int, chosen: np.ndarray) -> np.ndarray:
        """Experts of the next layer that followed the `chosen` ones in most steps, likeliest first."""
        odds = (self._followed[layer, chosen] / (self._times[layer, chosen, None] + 1)).mean(0)
        found = np.flatnonzero(odds >= LIKELY)
        return found[np.argsort(-odds[found], kind="stable")]
