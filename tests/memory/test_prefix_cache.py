"""Rows are found by the ids before them and no others, held by whom they should be, and lost in order of age."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.checkpoint import open_checkpoint
from hybrid.config import ModelConfig
from hybrid.memory.kv_cache import PAGE_SIZE, KVCache, pages_for
from hybrid.memory.prefix_cache import PrefixCache, common_prefix


@pytest.fixture(scope="module")
def config(tiny: Path) -> ModelConfig:
    with open_checkpoint(tiny) as checkpoint:
        return checkpoint.config


@dataclass
class Writer:
    """In place of a model: the row of a token is a number that stands for it and all before it."""

    cache: PrefixCache
    numbers: dict[tuple[int, ...], int]

    def rows(self, ids: Sequence[int], start: int) -> torch.Tensor:
        tags = [self.numbers.setdefault(tuple(ids[: at + 1]), len(self.numbers)) for at in range(start, len(ids))]
        return torch.tensor(tags, dtype=torch.float32)[:, None].expand(-1, self.cache.kv.rows.shape[-1])

    def begin(self, ids: Sequence[int]) -> tuple[list[int], int] | None:
        """Pages that hold all of `ids`, and how many rows of them were found; None if there is no room."""
        match = self.cache.find(ids)
        if self.cache.available(match) < pages_for(len(ids)) - len(match.full):
            return None
        pages, found = self.cache.open(match, len(ids))
        self.check(ids[:found], pages)
        self.write(ids, found, pages)
        return pages, found

    def write(self, ids: Sequence[int], past: int, pages: list[int]) -> None:
        assert all(self.cache.kv.holders[page] == 1 for page in pages[past // PAGE_SIZE :])
        if past < len(ids):
            for layer in range(len(self.cache.kv.rows)):
                self.cache.kv.write(layer, tuple(pages), past, self.rows(ids, past))
        self.cache.publish(ids, pages)

    def check(self, ids: Sequence[int], pages: list[int]) -> None:
        for layer in range(len(self.cache.kv.rows) if ids else 0):
            assert torch.equal(self.cache.kv.read(layer, tuple(pages), len(ids)), self.rows(ids, 0))


def writer(config: ModelConfig, pages: int) -> Writer:
    kv = KVCache(config, pages * PAGE_SIZE, dtype=torch.float32, device=torch.device("cpu"))
    return Writer(PrefixCache(kv), {})


def run(writer: Writer, ids: Sequence[int]) -> int:
    """A whole sequence; how many of its rows were found."""
    begun = writer.begin(ids)
    assert begun is not None
    writer.cache.keep(ids, begun[0])
    return begun[1]


def accounted(cache: PrefixCache, tables: Sequence[list[int]]) -> bool:
    """Whether every page is free or has just the holders it should."""
    held = Counter(cache.pages) + Counter(page for pages in tables for page in pages)
    right = all(cache.kv.holders[page] == held[page] for page in range(cache.kv.num_pages))
    return right and sorted([*cache.kv.free, *held]) == list(range(cache.kv.num_pages))


# Few ids and long runs of them: beginnings in common, ends within pages and at their edges.
IDS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 30, 63, 64, 70])), min_size=1, max_size=4).map(
    lambda runs: [token for token, length in runs for _ in range(length)]
)


@settings(max_examples=40)
@given(st.lists(IDS, min_size=1, max_size=7))
def test_with_room_the_longest_common_beginning_is_found(config: ModelConfig, sequences: list[list[int]]) -> None:
    made = writer(config, 64)
    for number, ids in enumerate(sequences):
        assert run(made, ids) == max((common_prefix(ids, other) for other in sequences[:number]), default=0)
        assert accounted(made.cache, [])


@settings(max_examples=60)
@given(st.integers(3, 12), st.data())
def test_whoever_comes_and_goes(config: ModelConfig, pages: int, data: st.DataObject) -> None:
    """Several at once, in little room: each reads its own rows, and no page is lost or lent to a writer twice."""
    made, running = writer(config, pages), []
    for _ in range(data.draw(st.integers(1, 15))):
        match data.draw(st.sampled_from(["begin", "grow", "end", "fail"])):
            case "begin":
                ids = data.draw(IDS)
                begun = made.begin(ids)
                running += [(ids, *begun)] if begun is not None else []
            case "grow" if running:
                ids, table, found = running.pop(0)
                longer = [*ids, *data.draw(IDS)]
                if made.cache.make_room(pages_for(len(longer)) - len(table)):
                    made.cache.kv.extend(table, len(longer))
                    made.write(longer, len(ids), table)
                    ids = longer
                running.append((ids, table, found))
            case "end" if running:
                ids, table, _ = running.pop(0)
                made.cache.keep(ids, table)
            case "fail" if running:
                ids, table, found = running.pop(0)
                made.cache.forget(ids, found)
                made.cache.keep(ids[:found], table)
        for ids, table, _ in running:
            made.check(ids, table)
        assert accounted(made.cache, [table for _, table, _ in running])
    for ids, table, _ in running:
        made.cache.keep(ids, table)
    assert accounted(made.cache, []) and made.cache.make_room(pages) and not made.cache.pages


def test_a_page_in_common_is_shared_and_one_half_in_common_copied(config: ModelConfig) -> None:
    made = writer(config, 8)
    common = [1] * (PAGE_SIZE + 20)
    first, second = [*common, *[2] * 60], [*common, *[3] * 60]
    run(made, first)
    (one, _), (two, found) = made.begin(first), made.begin(second)  # type: ignore[misc]
    assert one[0] == two[0] and one[1] != two[1] and found == len(common)
    made.check(first, one)
    made.check(second, two)


def test_what_goes_on_where_a_page_ends_takes_it_over(config: ModelConfig) -> None:
    made = writer(config, 8)
    ids = [1] * 100
    run(made, ids)
    begun = made.begin([*ids, *[2] * 100])
    assert begun == ([0, 1, 2, 3], 100)


def test_the_oldest_goes_first_and_its_end_before_its_beginning(config: ModelConfig) -> None:
    made = writer(config, 6)
    old, new = [1] * 3 * PAGE_SIZE, [2] * 3 * PAGE_SIZE
    run(made, old)
    run(made, new)
    assert made.cache.make_room(2)
    assert (made.cache.find(old).rows, len(made.cache.find(old).full), len(made.cache.find(new).full)) == (0, 1, 3)
    made.cache.find(old)  # what is looked for is used
    assert made.cache.make_room(4)
    assert (len(made.cache.find(old).full), len(made.cache.find(new).full)) == (1, 1)


def test_what_others_hold_stays(config: ModelConfig) -> None:
    made = writer(config, 4)
    held = made.begin([1] * 100)
    assert held is not None and not made.cache.make_room(3) and made.cache.make_room(2)
    assert made.begin([2] * 200) is None
    made.check([1] * 100, held[0])


def test_a_failure_is_forgotten_but_not_what_was_there_before(config: ModelConfig) -> None:
    made = writer(config, 16)
    known = [1] * 100
    run(made, known)
    ids = [*known, *[2] * 200]
    pages, found = made.begin(ids)  # type: ignore[misc]
    assert found == 100 and len(made.cache.find(ids).full) == len(ids) // PAGE_SIZE
    made.cache.forget(ids, found)
    made.cache.keep(ids[:found], pages)
    assert run(made, ids) == 100 and accounted(made.cache, [])


def test_clear(config: ModelConfig) -> None:
    made = writer(config, 16)
    run(made, [1] * 500)
    made.cache.clear()
    assert len(made.cache.kv.free) == 16 and made.cache.latest == []


def test_common_prefix() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([1, 2, 3], [1, 5, 3]) == 1
