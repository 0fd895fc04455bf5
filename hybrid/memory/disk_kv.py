"""Prefixes that outlive the program: rows of whole pages, written to disk as requests end and read back into pages.

Reading happens between two steps on the thread that computes: a page is used once all of it has the right checksum.
Writing must not hold up a step, so that thread only copies rows, a block per step while others wait for theirs, and
another thread writes them. What is copied and not written yet is bounded; what finds no room there waits in the cache.
"""

import hashlib
import logging
import threading
import time
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import takewhile
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numba
import numpy as np
import platformdirs
import torch
from torch import Tensor

import quant
from hybrid.checkpoint import Checkpoint, Pack
from hybrid.checkpoint.calibration import fingerprint
from hybrid.errors import CheckpointError
from hybrid.memory.direct import READERS, DirectFile
from hybrid.memory.hardware import disk_free
from hybrid.memory.kv_cache import PAGE_SIZE, KVCache
from hybrid.memory.kv_files import (
    BLOCK_PAGES,
    HEADER_BYTES,
    STEP,
    Block,
    BlockFiles,
    Header,
    Held,
    blocks_of,
    bytes_in,
    decode,
)
from hybrid.memory.prefix_cache import Match, PrefixCache
from quant.cpu import CPU_NAME, ISA

FEWEST = 256  # tokens: shorter prefixes are computed as fast as they are worth a file
PENDING = 1 << 30  # bytes of rows copied and not written yet
DEFAULT_BYTES, DEFAULT_SHARE = 8 << 30, 0.1  # at most so much, and of the disk's free space

log = logging.getLogger(__name__)


class _Owed(NamedTuple):
    """The block number `depth` of `ids`, to be kept as used at `used`, in nanoseconds."""

    ids: list[int]
    depth: int
    block: Block
    used: int


class _Job(NamedTuple):
    """Rows uint8 [pages, page_bytes] to be written as used at `used`, in nanoseconds."""

    block: Block
    rows: np.ndarray
    used: int


class DiskKV:
    """Pages of one cache on disk. One thread uses it, the one that uses the cache."""

    def __init__(self, files: BlockFiles, kv: KVCache) -> None:
        self.files = files
        self._kv = kv
        self._owed: deque[_Owed] = deque()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._changed = threading.Condition()  # guards `_pending`
        self._pending = 0
        self._refused = False  # the disk did not take something: nothing more is written
        self._thread = threading.Thread(target=self._write_all, name="kv-disk", daemon=True)
        self._thread.start()

    def recall(self, cache: PrefixCache, ids: Sequence[int], match: Match) -> int:
        """Put into `cache` what the disk has of `ids` beyond the full pages of `match`, which is what the cache has.

        Gives the tokens read. Other pages make room, as far as they may; if that is not enough, nothing is read.
        """
        known = len(match.full)
        found = self.files.find(ids) if len(ids) // PAGE_SIZE > known else []
        total = sum(each.pages for each in found)
        if total <= known:
            return 0
        pages = [node.page for node in match.full]
        for page in pages:
            self._kv.hold(page)  # not to be what makes room
        try:
            if not cache.make_room(total - known):
                return 0
            self._kv.extend(pages, total * PAGE_SIZE)
            whole = known + self._read(found, known, pages)
            cache.publish(ids[: whole * PAGE_SIZE], pages[:whole])
        finally:
            self._kv.release(pages)
        self.files.touch(found, time.time_ns())
        return (whole - known) * PAGE_SIZE

    def save(self, cache: PrefixCache, ids: Sequence[int]) -> None:
        """Have the disk keep the full pages that `cache` has of `ids`, if they are enough; `advance` sees to it."""
        whole = list(ids[: len(cache.find(ids).full) * PAGE_SIZE])
        if len(whole) < FEWEST or self._refused:
            return
        found, now = self.files.find(whole), time.time_ns()
        self.files.touch(found, now)
        for depth, block in enumerate(blocks_of(whole)):
            if depth >= len(found) or found[depth].pages < block.pages:
                self._owed.append(_Owed(whole, depth, block, now - depth * STEP))

    def advance(self, cache: PrefixCache, *, rest: bool = False, wait: bool = False) -> None:
        """Copy one block of what is to be kept, to be written, or, for the `rest`, as many as may be pending.

        Only with `wait` this waits for the drive.
        """
        while self._owed and self._claim(self._size(self._owed[0].block), wait):
            self._hand_over(cache, self._owed.popleft())
            if not rest:
                return

    def settle(self) -> None:
        """Wait until everything is written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)

    def close(self, cache: PrefixCache) -> None:
        """Write what there still is to write, and end the thread."""
        if self._thread.is_alive():
            self.advance(cache, rest=True, wait=True)
            self._jobs.put(None)
            self._thread.join()

    # -- reading ----------------------------------------------------------------------------------------------------
    def _read(self, found: Sequence[Held], known: int, pages: Sequence[int]) -> int:
        """Fill `pages`, which `found` is of, from number `known` on; how many of these are as they were written."""
        with ExitStack() as stack, ThreadPoolExecutor(READERS) as pool:
            places = [(each.header.block, index) for each in found for index in range(each.pages)][known:]
            opened = {block: self._open(block, stack) for block, _ in places}
            read = pool.map(lambda place, page: self._fill(opened[place[0]], place[1], page), places, pages[known:])
            return len(list(takewhile(bool, list(read))))

    def _open(self, block: Block, stack: ExitStack) -> tuple[DirectFile, Header] | None:
        """The file of `block` with what it says of itself at this moment; None if it is gone or damaged."""
        try:
            file = stack.enter_context(closing(DirectFile(self.files.path(block))))
            file.read(0, [head := np.empty(HEADER_BYTES, np.uint8)])
            return file, decode(head.tobytes(), self.files.model)
        except (CheckpointError, ValueError) as error:
            self.files.drop(block.name, str(error))
            return None

    def _fill(self, opened: tuple[DirectFile, Header] | None, index: int, page: int) -> bool:
        """Read page `index` of a file into `page`; False, and the file is dropped, if it is not what was written."""
        if opened is None:
            return False
        file, header = opened
        rows = self._rows(page)
        target = rows if rows.device.type == "cpu" else torch.empty_like(rows, device="cpu")
        parts = [layer.reshape(-1) for layer in target.numpy()]
        try:
            file.read(HEADER_BYTES + index * header.page_bytes, parts)
        except CheckpointError as error:
            self.files.drop(file.path.name, error.message)
            return False
        if _checksum(parts) != header.sums[index]:
            self.files.drop(file.path.name, f"page {index} of it is damaged")
            return False
        if target is not rows:
            rows.copy_(target)
        return True

    def _rows(self, page: int) -> Tensor:
        """uint8 [layers, PAGE_SIZE, bytes of a row]: a page where it lies."""
        return self._kv.rows[:, page * PAGE_SIZE : (page + 1) * PAGE_SIZE].view(torch.uint8)

    # -- writing ----------------------------------------------------------------------------------------------------
    def _hand_over(self, cache: PrefixCache, owed: _Owed) -> None:
        """Let the other thread write a block, if the cache still has it."""
        nodes = cache.find(owed.ids).full[owed.depth * BLOCK_PAGES :][: owed.block.pages]
        if len(nodes) < owed.block.pages:
            self._release(self._size(owed.block))
        else:
            self._jobs.put(_Job(owed.block, self._copy([node.page for node in nodes]), owed.used))

    def _size(self, block: Block) -> int:
        return block.pages * self.files.page_bytes

    def _claim(self, size: int, wait: bool) -> bool:
        """Count `size` bytes as pending, if there is room for them or as soon as there is."""

        def fits() -> bool:
            return not self._pending or self._pending + size <= PENDING

        with self._changed:
            if wait:
                self._changed.wait_for(fits)
            if not fits():
                return False
            self._pending += size
            return True

    def _release(self, size: int) -> None:
        with self._changed:
            self._pending -= size
            self._changed.notify_all()

    def _copy(self, pages: Sequence[int]) -> np.ndarray:
        """uint8 [pages, page_bytes]."""
        copy = np.empty((len(pages), self.files.page_bytes), np.uint8)
        for target, page in zip(copy, pages, strict=True):
            rows = self._rows(page).cpu().numpy()
            target.reshape(rows.shape)[:] = rows  # not by torch, which would wake all threads for every page
        return copy

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._refused:
                self._write(job)
            self._release(job.rows.nbytes)

    def _write(self, job: _Job) -> None:
        try:
            self.files.write(*job)
        except OSError as error:
            self._refused = True
            reason = error.strerror or error
            log.warning("%s: %s. No more prompts are kept on disk.", self.files.directory, reason)


def _checksum(parts: Sequence[np.ndarray]) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part.data, crc)
    return crc


# -- which rows -------------------------------------------------------------------------------------------------------
def open_disk_kv(checkpoint: Checkpoint, kv: KVCache, budget: int | None, *facts: object) -> DiskKV | None:
    """The pages kept in this user's cache for such a model: `budget` bytes of all models together, by default what
    `default_budget` says. `facts` are what rows depend on beside the weights, the cache and this program.

    None for a budget of 0.
    """
    if budget == 0:
        return None
    root = platformdirs.user_cache_path("kimi-local") / "kv"
    page_bytes = kv.rows[:, :PAGE_SIZE].nbytes
    size = default_budget(root) if budget is None else budget
    return DiskKV(BlockFiles(root, model_key(checkpoint, kv, *facts), page_bytes, size), kv)


def default_budget(root: Path) -> int:
    """Bytes: DEFAULT_BYTES, or DEFAULT_SHARE of what is free or taken by such files where that is less."""
    return int(min(DEFAULT_BYTES, DEFAULT_SHARE * (disk_free(root) + bytes_in(root))))


def model_key(checkpoint: Checkpoint, kv: KVCache, *facts: object) -> bytes:
    """32 bytes that stand for all that the values of rows depend on but their ids."""
    digest = hashlib.sha256(fingerprint(checkpoint).encode())
    layout = kv.dtype, kv.format, kv.rows.device.type
    for part in (*_weights(checkpoint), *_arithmetic(), *layout, *facts):
        digest.update(repr(part).encode() + b"\0")
    return digest.digest()


def _weights(checkpoint: Checkpoint) -> list[object]:
    """A pack's manifest has checksums of everything; for others names, sizes and times of the files stand."""
    if isinstance(checkpoint, Pack):
        return [(checkpoint.path / "manifest.json").read_bytes()]
    files = [(path.name, path.stat()) for path in sorted(checkpoint.path.glob("*.safetensors"))]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in files]


def _arithmetic() -> list[object]:
    """All that computes, by the content of its source, and what it is compiled by and runs on."""
    hybrid = Path(__file__).parents[1]
    rooms = [Path(quant.__file__).parent, hybrid / "checkpoint", hybrid / "memory", hybrid / "model"]
    sources = [source for room in rooms for source in sorted(room.rglob("*.py"))]
    digests = [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]
    versions = [torch.__version__, numba.__version__, np.__version__, torch.backends.cpu.get_cpu_capability()]
    return [*digests, *versions, CPU_NAME, ISA]
