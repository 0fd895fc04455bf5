"""What comes back from the disk is what was put there, of the very ids, or nothing: whoever else is at the files."""

import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.checkpoint import open_checkpoint
from hybrid.config import ModelConfig
from hybrid.memory.disk_kv import FEWEST, DiskKV, default_budget
from hybrid.memory.kv_cache import PAGE_SIZE, KVCache, pages_for
from hybrid.memory.kv_files import (
    BLOCK_IDS,
    BLOCK_PAGES,
    Block,
    BlockFiles,
    Header,
    blocks_of,
    bytes_in,
    decode,
    encode,
    spelled,
)
from hybrid.memory.prefix_cache import PrefixCache, common_prefix

MODEL, OTHER = bytes(range(32)), bytes(32)
ROOM = 1 << 30


@pytest.fixture(scope="module")
def config(tiny: Path) -> ModelConfig:
    with open_checkpoint(tiny) as checkpoint:
        return checkpoint.config


def rows_of(config: ModelConfig, ids: Sequence[int]) -> torch.Tensor:
    """In place of a model: float32 [layers, tokens, latent_dim] that depend on a token and all before it."""
    sums = torch.tensor(ids, dtype=torch.float64).add(1).mul(torch.arange(1, len(ids) + 1)).cumsum(0).remainder(9973)
    layers, width = torch.arange(config.num_hidden_layers), torch.arange(config.latent_dim)
    return (sums[None, :, None] + layers[:, None, None] / 8 + width / 1024).float()


class Program:
    """From its start to its end: a cache that computes what it does not find."""

    def __init__(self, config: ModelConfig, root: Path, *, pages: int = 64, budget: int = ROOM, model: bytes = MODEL):
        self.config = config
        kv = KVCache(config, pages * PAGE_SIZE, dtype=torch.float32, device=torch.device("cpu"))
        self.cache = PrefixCache(kv)
        self.files = BlockFiles(root, model, kv.rows[:, :PAGE_SIZE].nbytes, budget)
        self.disk = DiskKV(self.files, kv)

    def run(self, ids: Sequence[int]) -> int:
        """Have rows for `ids`, as a request would; gives how many tokens came from the disk. All rows are checked."""
        match = self.cache.find(ids)
        assert self.cache.available(match) >= pages_for(len(ids)) - len(match.full)
        read = self.disk.recall(self.cache, ids, match)
        pages, found = self.cache.open(self.cache.find(ids), len(ids))
        assert found >= read
        expected, kv = rows_of(self.config, ids), self.cache.kv
        for layer, rows in enumerate(expected):
            if found:
                assert torch.equal(kv.read(layer, tuple(pages), found), rows[:found])
            if found < len(ids):
                kv.write(layer, tuple(pages), found, rows[found:])
        self.cache.keep(ids, pages)
        self.disk.save(self.cache, ids)
        self.disk.advance(self.cache, rest=True)
        return read

    def end(self) -> None:
        self.disk.close(self.cache)
        pages = self.cache.pages
        assert all(self.cache.kv.holders[page] == 1 for page in pages)
        assert sorted(self.cache.kv.free + pages) == list(range(self.cache.kv.num_pages))


@pytest.fixture
def start(config: ModelConfig, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    running: list[Program] = []

    def start(**settings: object) -> Program:
        running.append(Program(config, tmp_path / "kv", **settings))  # type: ignore[arg-type]
        return running[-1]

    yield start
    for each in running:
        each.end()


def once(start: Callable[..., Program], ids: Sequence[int], **settings: object) -> int:
    """A whole run of the program with one request."""
    program = start(**settings)
    read = program.run(ids)
    program.end()
    return read


def prompt(pages: Sequence[int], more: int = 0) -> list[int]:
    """Ids of pages that each are one of a few, and `more` behind them."""
    return [number * PAGE_SIZE + at for number in pages for at in range(PAGE_SIZE)] + list(range(more))


def tree(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


# -- what is found ----------------------------------------------------------------------------------------------------
@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=35), min_size=1, max_size=5), st.integers(0, 63))
def test_the_longest_beginning_is_found_after_a_restart(
    config: ModelConfig, tmp_path_factory: pytest.TempPathFactory, choices: list[list[int]], more: int
) -> None:
    """The reference: of all prompts that were long enough, the one with most whole pages in common."""
    root, saved = tmp_path_factory.mktemp("kv"), list[list[int]]()
    for pages in choices:
        ids = prompt(pages, more)
        program = Program(config, root)
        longest = max((common_prefix(each, ids) for each in saved), default=0)
        assert program.run(ids) == longest // PAGE_SIZE * PAGE_SIZE
        program.end()
        if len(pages) * PAGE_SIZE >= FEWEST:
            saved.append(prompt(pages))


def test_prompts_share_files_and_longer_ones_replace_shorter(start: Callable[..., Program], tmp_path: Path) -> None:
    start().run(prompt([1] * 20))
    start().disk.settle()
    once(start, prompt([1] * 20 + [2] * 6))
    assert len(tree(tmp_path)) == 2  # the second block grew
    once(start, prompt([1] * 20 + [3] * 6))
    assert len(tree(tmp_path)) == 3  # and another one follows upon the first


def test_only_what_memory_lacks_is_read(start: Callable[..., Program]) -> None:
    once(start, prompt([1] * 20))
    program = start()
    assert program.run(prompt([1] * 3)) == 3 * PAGE_SIZE
    assert program.run(prompt([1] * 20)) == 17 * PAGE_SIZE
    assert program.run(prompt([1] * 20)) == 0


@pytest.mark.parametrize(("pages", "kept"), [(3, 0), (4, 4)])
def test_short_prompts_are_not_kept(start: Callable[..., Program], tmp_path: Path, pages: int, kept: int) -> None:
    once(start, prompt([1] * pages, 63))
    assert bool(tree(tmp_path)) == bool(kept)
    assert once(start, prompt([1] * 9)) == kept * PAGE_SIZE


def test_other_models_see_nothing(start: Callable[..., Program]) -> None:
    ids = prompt([1] * 9)
    once(start, ids)
    assert once(start, ids, model=OTHER) == 0
    assert once(start, ids) == len(ids)


def test_where_pages_are_few_nothing_in_use_is_lost(start: Callable[..., Program]) -> None:
    once(start, prompt([1] * 20))
    program = start(pages=20)
    program.run(prompt([2] * 12))
    program.run(prompt([1] * 5))
    assert program.run(prompt([1] * 20)) == 15 * PAGE_SIZE
    held: list[int] = []
    program.cache.clear()
    program.cache.kv.extend(held, 10 * PAGE_SIZE)
    assert program.disk.recall(program.cache, prompt([1] * 20), program.cache.find([])) == 0
    program.cache.kv.release(held)


def test_files_are_their_owners_alone(start: Callable[..., Program], tmp_path: Path) -> None:
    once(start, prompt([1] * 4))
    (file,) = tree(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600
    assert all(each.stat().st_mode & 0o777 == 0o700 for each in (file.parent, file.parent.parent))


# -- how much there is ------------------------------------------------------------------------------------------------
def test_the_budget_holds_and_what_was_used_last_stays(start: Callable[..., Program], tmp_path: Path) -> None:
    block = Header(Block(b"", spelled(range(4 * PAGE_SIZE))), start().files.page_bytes, ()).file_bytes
    for number in range(6):
        once(start, prompt([number] * 4), budget=3 * block + 100)
        assert bytes_in(tmp_path / "kv") <= 3 * block + 100
        assert once(start, prompt([0] * 4), budget=3 * block + 100) == 4 * PAGE_SIZE
    assert [once(start, prompt([number] * 4), budget=0) > 0 for number in range(6)] == [True, *[False] * 3, True, True]


def test_of_a_long_prompt_the_beginning_stays(start: Callable[..., Program], tmp_path: Path) -> None:
    page = start().files.page_bytes
    budget = 2 * (BLOCK_PAGES * page + 8192)
    once(start, prompt([7] * 4), budget=budget)
    once(start, prompt([1] * 3 * BLOCK_PAGES), budget=budget)
    assert once(start, prompt([1] * 3 * BLOCK_PAGES), budget=budget) == 2 * BLOCK_IDS
    assert bytes_in(tmp_path / "kv") <= budget


def test_what_does_not_fit_into_the_queue_is_written_at_the_end(
    start: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid.memory.disk_kv.PENDING", 1)
    monkeypatch.setattr(BlockFiles, "write", _slowly(BlockFiles.write))
    program, ids = start(), prompt([1] * 40)
    program.run(ids)
    program.disk.settle()
    assert 0 < sum(each.pages for each in program.files.find(ids)) < 40
    program.end()
    assert once(start, ids) == len(ids)


def _slowly(write: Callable[..., None]) -> Callable[..., None]:
    def slow(*given: object) -> None:
        time.sleep(0.05)
        write(*given)

    return slow


def test_the_default_is_a_tenth_of_the_space_at_most(tmp_path: Path) -> None:
    assert 0 < default_budget(tmp_path / "kv") <= 8 << 30


# -- what can go wrong ------------------------------------------------------------------------------------------------
@given(st.data())
def test_headers_come_back_or_are_refused(data: st.DataObject) -> None:
    pages = data.draw(st.integers(1, BLOCK_PAGES))
    ids = data.draw(st.integers(0, 1 << 20)) + np.arange(pages * PAGE_SIZE)
    header = Header(Block(bytes(16), spelled(ids.tolist())), 4096, tuple(range(pages)))
    written = encode(header, MODEL)
    assert decode(written, MODEL) == header
    with pytest.raises(ValueError, match="another model"):
        decode(written, OTHER)
    at, flip = data.draw(st.integers(0, len(written) - 1)), data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match="damaged"):
        decode(written[:at] + bytes([written[at] ^ flip]) + written[at + 1 :], MODEL)


def test_damaged_files_are_dropped_and_said(start: Callable[..., Program], caplog: pytest.LogCaptureFixture) -> None:
    rng, ids = random.Random(0), prompt([1] * 18)
    whole = start()
    whole.run(ids)
    whole.end()
    files = {path: path.read_bytes() for path in tree(whole.files.directory)}
    for _ in range(60):
        path = rng.choice(list(files))
        content = bytearray(files[path])
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        path.write_bytes(content)
        caplog.clear()
        seen = start()
        assert seen.run(ids) < len(ids) and seen.files.dropped == 1
        seen.end()
        assert "was removed" in caplog.text
        assert once(start, ids) == len(ids)  # written again


@pytest.mark.parametrize("name", ["x", "x.kv", "0" * 32 + "-" + "0" * 32 + ".kv", "ü" * 80])
def test_strange_files_are_dropped(start: Callable[..., Program], name: str) -> None:
    ids = prompt([1] * 4)
    once(start, ids)
    strange = start().files.directory / name
    strange.write_bytes(b"hello")
    assert once(start, ids) == len(ids) and not strange.exists()


def test_a_file_that_is_replaced_is_read_as_it_is_now(start: Callable[..., Program]) -> None:
    ids = prompt([1] * 4)
    once(start, ids)
    late = start()
    (held,) = late.files.find(ids)
    path = late.files.path(held.header.block)
    path.unlink()
    late.files._known.clear()
    once(start, ids)
    assert late.run(ids) == len(ids)
    path.unlink()
    late.cache.clear()
    assert late.run(ids) == 0


def test_a_full_disk_is_said_once(
    start: Callable[..., Program], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    program = start()
    monkeypatch.setattr(os, "replace", refuse)
    for number in range(3):
        program.run(prompt([number] * 4))
        program.disk.settle()
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "No space left on device. No more prompts are kept on disk."
    ]
    assert not tree(program.files.root)


def test_a_place_that_is_none_is_said_once(
    config: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    program = Program(config, tmp_path / "file" / "kv")
    assert program.run(prompt([1] * 4)) == 0
    program.end()
    assert caplog.text.count("No more prompts") == 1


# -- who else is there ------------------------------------------------------------------------------------------------
WRITER = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from hybrid.memory.kv_files import BlockFiles, blocks_of
files = BlockFiles(Path(sys.argv[1]), bytes(range(32)), 20000, 1 << 30)
for kill in range(25):
    child = os.fork()
    if not child:
        for number in range(1 << 20):
            for block in blocks_of([kill * 1000 + number] * 1280):
                files.write(block, np.full((block.pages, 20000), number % 251, np.uint8), time.time_ns())
    time.sleep(random.Random(kill).uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_killed_writers_leave_whole_files_or_none(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path)], check=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    files = BlockFiles(tmp_path, MODEL, 20000, ROOM)
    left = tree(files.directory)
    assert left and all(path.suffix == ".kv" for path in left), "what was unfinished is gone"
    assert all(files._header(path.name) is not None for path in left)


def test_what_a_living_process_writes_stays(start: Callable[..., Program]) -> None:
    once(start, prompt([1] * 4))
    files = start().files
    with files._unfinished() as (_, path):
        start()
        assert path.exists()
    assert not path.exists()


def test_two_programs_share_a_directory(config: ModelConfig, tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(8):
                program = Program(config, tmp_path, budget=1 << 20)
                for _ in range(3):
                    program.run(prompt([rng.randrange(2)] * rng.randrange(4, 20)))
                program.end()
        except BaseException as error:  # told by the test
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed


def test_emptied_while_in_use(start: Callable[..., Program]) -> None:
    ids = prompt([1] * 4)
    program = start()
    program.run(ids)
    program.disk.settle()
    for path in tree(program.files.root):
        path.unlink()
    program.files.directory.rmdir()
    program.files.root.rmdir()
    program.run(ids)
    program.end()
    assert once(start, ids) == len(ids)


def test_blocks_of() -> None:
    ids = list(range(2 * BLOCK_IDS + PAGE_SIZE + 5))
    blocks = list(blocks_of(ids))
    assert [block.pages for block in blocks] == [BLOCK_PAGES, BLOCK_PAGES, 1]
    assert b"".join(block.ids for block in blocks) == spelled(ids[:-5])
    assert blocks[1].parent == blocks[0].key and len({block.name for block in blocks}) == 3
