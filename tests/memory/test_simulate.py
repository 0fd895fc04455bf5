"""The simulation of resources, and the traces it replays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.memory.simulate import (
    EXPECTED,
    FLAT,
    SKEWED,
    Skew,
    Task,
    distinct_experts,
    expected_uses,
    simulate,
    synthetic_trace,
)


def test_tasks_overlap_on_different_resources_and_queue_on_one() -> None:
    both = simulate([Task({"gpu": 2.0}), Task({"cpu": 3.0})])
    assert both.seconds == 3.0 and both.limit == "cpu"
    assert simulate([Task({"cpu": 2.0}), Task({"cpu": 3.0})]).seconds == 5.0
    assert simulate([Task({"gpu": 2.0}), Task({"cpu": 3.0}, (0,))]).seconds == 5.0


def test_a_task_lasts_as_long_as_its_slowest_resource_and_frees_the_others() -> None:
    tasks = [Task({"cpu": 1.0, "ram": 4.0}), Task({"cpu": 1.0}), Task({"ram": 1.0}, (1,))]
    timeline = simulate(tasks)
    assert timeline.seconds == 5.0  # the third has waited for the memory, not for the second
    assert timeline.busy == {"cpu": 2.0, "ram": 5.0} and timeline.limit == "ram"


def test_nothing_takes_no_time() -> None:
    assert simulate([]).seconds == 0.0 and simulate([]).limit == "nothing"


@st.composite
def graphs(draw: st.DrawFn) -> list[Task]:
    tasks = []
    for number in range(draw(st.integers(1, 12))):
        seconds = draw(st.dictionaries(st.sampled_from("abc"), st.floats(0.0, 9.0), min_size=1))
        after = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        tasks.append(Task(seconds, tuple(after)))
    return tasks


@given(graphs())
def test_time_lies_between_the_busiest_resource_and_no_overlap(tasks: list[Task]) -> None:
    timeline = simulate(tasks)
    path: list[float] = []  # the longest chain of what must follow each other
    for task in tasks:
        path.append(max((path[n] for n in task.after), default=0.0) + max(task.seconds.values()))
    assert timeline.seconds >= max(*timeline.busy.values(), *path) - 1e-9
    assert timeline.seconds <= sum(timeline.busy.values()) + 1e-9


@pytest.mark.parametrize("skew", [FLAT, EXPECTED, SKEWED])
def test_a_trace_has_the_skew_it_was_asked_for(skew: Skew) -> None:
    trace, chances = synthetic_trace(400, 2, 384, 8, skew, np.random.default_rng(3))
    assert trace.shape == (400, 2, 8) and all(len(set(ids)) == 8 for step in trace for ids in step)
    assert chances.sum(axis=2).mean() == pytest.approx(8, rel=0.02)
    stay = np.mean([np.isin(trace[t + 1, 0], trace[t, 0]).mean() for t in range(399)])
    assert skew.persistence <= stay < skew.persistence + 0.06


def test_the_skewed_trace_is_as_published() -> None:
    """44 % stay from token to token; half of the experts get 75 to 78 % of the uses (counting noise adds a little)."""
    trace, _ = synthetic_trace(1000, 1, 384, 8, SKEWED, np.random.default_rng(0))
    counts = np.sort(np.bincount(trace.ravel(), minlength=384))
    assert 0.75 < counts[192:].sum() / counts.sum() < 0.80
    stay = np.mean([np.isin(trace[t + 1, 0], trace[t, 0]).mean() for t in range(999)])
    assert stay == pytest.approx(0.44, abs=0.03)


def test_chances_come_true() -> None:
    trace, chances = synthetic_trace(2000, 1, 16, 2, SKEWED, np.random.default_rng(0))
    used = np.zeros(chances.shape, bool)
    np.put_along_axis(used, trace, True, axis=2)
    for low, high in ((0.02, 0.1), (0.1, 0.3), (0.4, 0.6)):
        among = (chances > low) & (chances < high)
        assert used[among].mean() == pytest.approx(chances[among].mean(), abs=0.03)


def test_uses_add_up_and_larger_caches_hit_more() -> None:
    def rate(vram: float, ram: float, skew: Skew = EXPECTED) -> tuple[float, float]:
        uses = expected_uses(64, 4, vram, ram, skew)
        assert np.allclose(uses.vram + uses.ram + uses.nvme, 4)
        return float(uses.vram.mean()), float(uses.nvme.mean())

    assert rate(0.0, 1.0) == (0.0, 0.0)
    assert rate(0.2, 2.0)[1] == 0.0
    assert 0 < rate(0.1, 2.0)[0] < rate(0.3, 2.0)[0]
    assert rate(0.0, 0.2)[1] > rate(0.0, 0.6)[1] > 0
    assert rate(0.1, 2.0, FLAT)[0] < rate(0.1, 2.0, SKEWED)[0]


def test_distinct_experts() -> None:
    assert distinct_experts(384, 8, 1) == pytest.approx(8)
    assert distinct_experts(384, 8, 128) == pytest.approx(358, abs=1)
    assert distinct_experts(0, 0, 9) == 0
