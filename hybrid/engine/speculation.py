"""Guessing the next ids of an answer from what it repeats, and whether checking the guesses pays.

A step that computes several rows of a sequence takes longer than one of a single row, above all where every further
row reads experts of its own. It pays where enough of the guesses are right, as in code or text that is quoted. How many
are right is known without trying: each guess is compared with what comes, computed from it or not. Only what a step of
so many rows takes has to be tried, and that is measured, seldom again where it did not pay.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from statistics import median

from hybrid.model.attention import FEW

ROWS = FEW  # of a step, at most: beyond it products are computed in another way
MOST = ROWS - 1  # ids guessed for one sequence
SIZES = (3, 2)  # ids that must be the same for what followed to be a guess, tried in this order
MEMORY = 16  # guesses that hope is mostly based on
WORTH = 0.1  # ids per sequence and step to be gained, below which nothing is tried
ENOUGH = 3  # steps that a first judgement is based on
RECENT = 5  # and later ones, at most
EVERY, SELDOM = 16, 512  # steps after which what seemed slower is tried again: at first, and when it is so each time


class Drafter:
    """Guesses for one sequence."""

    def __init__(self) -> None:
        self.hope = [0.0] * (MOST + 1)  # how many of so many guessed ids are right, on average
        self._ends: dict[tuple[int, ...], int] = {}  # ids in a row -> where they ended last
        self._learnt = 0  # the last of these ends
        self._guess: list[int] = []  # to be compared once all of it has come
        self._at = 0  # where it should begin
        self._compared = 0

    def draft(self, ids: Sequence[int]) -> list[int]:
        """MOST ids that followed when it last went as `ids` ends; none if it never did.

        `ids` begin with those of the call before. What runs into the end of `ids` goes on from its own beginning.
        """
        self._compare(ids)
        self._learn(ids)
        found = (self._ends.get(tuple(ids[-size:])) for size in SIZES if len(ids) > size)
        end = next((end for end in found if end is not None), None)
        if end is None:
            return []
        draft = [ids[end + i % (len(ids) - end)] for i in range(MOST)]
        if not self._guess:
            self._guess, self._at = draft, len(ids)
        return draft

    def _learn(self, ids: Sequence[int]) -> None:
        """Note where runs of ids ended, but for those at the very end of `ids`: nothing follows there yet."""
        for end in range(self._learnt + 1, len(ids)):
            for size in SIZES:
                if end >= size:
                    self._ends[tuple(ids[end - size : end])] = end
        self._learnt = max(self._learnt, len(ids) - 1)

    def _compare(self, ids: Sequence[int]) -> None:
        """Learn from the guess under way, if all of the ids have come that it was about."""
        if not self._guess or len(ids) < self._at + MOST:
            return
        came = ids[self._at : self._at + MOST]
        right = next((i for i, pair in enumerate(zip(self._guess, came, strict=True)) if pair[0] != pair[1]), MOST)
        self._compared = min(self._compared + 1, MEMORY)
        self.hope = [hope + (min(right, most) - hope) / self._compared for most, hope in enumerate(self.hope)]
        self._guess = []


class Gauge:
    """Decides how many ids to draft, by what steps take. One for all that a model computes."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` gives seconds; whoever computes a step takes them from it too."""
        self.clock = clock
        self._seconds: defaultdict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._best = 0
        self._every, self._since = EVERY, 0
        self._trials = 0

    def note(self, sequences: int, rows: int, seconds: float) -> None:
        """A step of so many answers, with so many rows in all, took `seconds`."""
        self._seconds[sequences, rows].append(seconds)

    def choose(self, sequences: int, hopes: Sequence[Sequence[float]]) -> int:
        """How many ids to draft for each that has a guess, with their hopes, among `sequences` answers of a step."""
        gains = {}
        for most in range(1, (ROWS - sequences) // max(1, len(hopes)) + 1):
            gain = sum(hope[most] for hope in hopes)
            if gain >= WORTH * sequences:
                gains[most] = gain
        if not gains:
            return 0
        times = {most: self._seconds[sequences, sequences + most * len(hopes)] for most in (0, *gains)}
        for most, seconds in times.items():
            if len(seconds) < ENOUGH:
                return most
        rates = {most: (sequences + gains.get(most, 0)) / median(seconds) for most, seconds in times.items()}
        return self._settle(max(rates, key=rates.__getitem__), list(rates))

    def _settle(self, best: int, choices: Sequence[int]) -> int:
        """`best`, but now and then another of `choices`, in turn: ever more seldom while they prove worse."""
        if best != self._best:
            self._best, self._every, self._since = best, EVERY, 0
        self._since += 1
        if self._since < self._every:
            return best
        self._since, self._every = 0, min(2 * self._every, SELDOM)
        self._trials += 1
        others = [most for most in choices if most != best]
        return others[self._trials % len(others)]
