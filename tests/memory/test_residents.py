"""Who is in RAM: slots belong to one expert each, what is kept stays, and the coldest go first."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hybrid.memory.residents import Following, Residents

LAYERS, EXPERTS = 3, 8
KEYS = st.integers(0, LAYERS * EXPERTS - 1)


@given(st.integers(1, 9), st.lists(st.tuples(st.sets(KEYS, max_size=6), st.sets(KEYS, max_size=6)), max_size=12))
def test_every_slot_has_one_owner(slots: int, steps: list[tuple[set[int], set[int]]]) -> None:
    residents = Residents(LAYERS, EXPERTS, slots)
    for wanted, kept in steps:
        before = dict(residents.slot_of)
        lacking = sorted(wanted - before.keys())
        admitted = residents.admit(lacking, kept)
        assert admitted == lacking[: len(admitted)]
        assert sorted(residents.slot_of.values()) == sorted(set(residents.slot_of.values()))
        assert all(0 <= slot < slots for slot in residents.slot_of.values())
        assert all(residents.slot_of[key] == slot for key, slot in before.items() if key in kept)
        room = slots - len(before.keys() & kept)
        assert len(admitted) == min(len(lacking), room), "as many as there is room for"


def test_the_coldest_go_first() -> None:
    residents = Residents(LAYERS, EXPERTS, 4)
    odds = np.zeros((LAYERS, EXPERTS))
    odds[1, :4] = 0.9, 0.1, 0.5, 0.2
    residents.expect(odds)
    residents.admit([8, 9, 10, 11], ())
    residents.admit([16, 17], ())
    assert set(residents.slot_of) == {8, 10, 16, 17}
    for _ in range(3):
        residents.note(1, np.array([0]))
        residents.note(2, np.array([1]))
    residents.admit([20], ())
    assert set(residents.slot_of) == {8, 17, 10, 20}, (
        "the one that was expected, and never came, is not the coldest yet"
    )


def test_a_dropped_slot_is_free() -> None:
    residents = Residents(LAYERS, EXPERTS, 1)
    residents.admit([5], ())
    residents.drop(5)
    assert residents.slot_of == {} and residents.admit([6], {5}) == [6]


def test_experts_that_mostly_follow_are_likely() -> None:
    following = Following(LAYERS, EXPERTS)
    chosen = np.array([1, 2])
    assert following.likely(1, chosen).size == 0
    for turn in range(6):
        following.learn(1, chosen, np.array([3, 4 if turn % 3 else 5]))
    assert following.likely(1, chosen).tolist() == [3, 4]
    assert following.likely(1, np.array([7])).size == 0 and following.likely(2, chosen).size == 0
