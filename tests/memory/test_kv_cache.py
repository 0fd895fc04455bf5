from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid.checkpoint import open_checkpoint
from hybrid.memory.kv_cache import PAGE_SIZE, KVCache
from hybrid.memory.kv_codec import decode, encode


@pytest.fixture
def cache(tiny) -> KVCache:
    with open_checkpoint(tiny) as checkpoint:
        return KVCache(checkpoint.config, 6 * PAGE_SIZE, dtype=torch.float32, device=torch.device("cpu"))


def rows(cache: KVCache, count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, cache.rows.shape[-1]), np.float32))


def test_reads_back_what_was_written_in_pieces(cache: KVCache) -> None:
    table: list[int] = []
    expected = rows(cache, 3 * PAGE_SIZE - 5, 0)
    past = 0
    for piece in (1, 7, PAGE_SIZE, 60, len(expected) - 68 - PAGE_SIZE):
        cache.extend(table, past + piece)
        cache.write(0, tuple(table), past, expected[past : past + piece])
        past += piece
    assert torch.equal(cache.read(0, tuple(table), past), expected)


def test_scattered_pages_hold_the_same_as_neighbouring_ones(cache: KVCache) -> None:
    first: list[int] = []
    blocker: list[int] = []
    expected = rows(cache, 3 * PAGE_SIZE, 1)
    for done in range(PAGE_SIZE, 4 * PAGE_SIZE, PAGE_SIZE):  # another sequence takes a page in between
        cache.extend(first, done)
        if done < 3 * PAGE_SIZE:
            cache.extend(blocker, done)
    assert first != list(range(first[0], first[0] + 3))
    for layer in range(2):
        cache.write(layer, tuple(first), 0, expected[:100])
        cache.write(layer, tuple(first), 100, expected[100:])
        assert torch.equal(cache.read(layer, tuple(first), len(expected)), expected)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduced_rows_are_rounded_once(cache: KVCache, kind: str, dtype: torch.dtype, tiny: Path) -> None:
    """Wherever they lie, and as they come: what is read is what the bytes mean, in the type that was asked for."""
    with open_checkpoint(tiny) as checkpoint:
        reduced = KVCache(checkpoint.config, 6 * PAGE_SIZE, dtype=dtype, device=torch.device("cpu"), kind=kind)
    written = rows(cache, 2 * PAGE_SIZE + 5, 2).to(dtype)
    expected = decode(encode(written, reduced.format), reduced.format, dtype)
    for pages in ((0, 1, 2), (5, 3, 4)):
        for past, stop in ((0, 1), (1, 70), (70, len(written))):
            reduced.write(1, pages, past, written[past:stop])
        assert torch.equal(reduced.read(1, pages, len(written)), expected)
    assert reduced.rows.dtype == torch.uint8 and reduced.rows.shape[2] == reduced.format.row_bytes
    reduced.copy(5, 1, 10)
    assert torch.equal(reduced.read(1, (1,), 10), expected[:10])


def test_contiguous_reads_do_not_copy(cache: KVCache) -> None:
    table: list[int] = []
    cache.extend(table, 2 * PAGE_SIZE)
    assert cache.read(1, tuple(table), 100).data_ptr() == cache.rows[1].data_ptr()


def test_release_gives_pages_back_and_keeps_the_rest(cache: KVCache) -> None:
    table: list[int] = []
    cache.extend(table, cache.capacity)
    assert not cache.free
    cache.release(table, PAGE_SIZE + 1)
    assert len(table) == 2 and len(cache.free) == cache.num_pages - 2
    cache.release(table)
    assert sorted(cache.free) == list(range(cache.num_pages)) and not table
