"""Cached rows as files: blocks of up to sixteen pages, found by the ids before and in them.

A name is two keys: of all ids before the block, and of all up to its end. So the files are a tree, as pages in memory
are, and prompts that begin alike share them. After a header come the pages, each with its rows [layers, PAGE_SIZE, ..]
as they lie in memory.

Every page and the header have a checksum that is compared before anything is used. So nothing is flushed to the drive:
what a power cut tears is noticed and dropped, as is whatever else does not belong here. A file gets its name when it is
whole; until then a lock on it says that its writer lives.
"""

import fcntl
import logging
import os
import re
import struct
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from hybrid.memory.kv_cache import PAGE_SIZE

BLOCK_PAGES = 16
BLOCK_IDS = BLOCK_PAGES * PAGE_SIZE
ID_BYTES = 4
_PAGE, _BLOCK = PAGE_SIZE * ID_BYTES, BLOCK_IDS * ID_BYTES  # bytes of their ids
HEADER_BYTES = 8192  # pages begin where a drive's sectors do
MAGIC = b"kimi-kv1"
ROOT = bytes(16)  # the key of no ids
UNFINISHED = ".new"
STEP = 1000  # nanoseconds by which a block counts as used before the one that it follows upon
_NAME = re.compile(r"([0-9a-f]{32})-[0-9a-f]{32}\.kv")
_FIXED = struct.Struct("<8s32s16sIQ")  # magic, model, parent, pages, bytes of a page

log = logging.getLogger(__name__)


class Block(NamedTuple):
    """The ids of one to BLOCK_PAGES whole pages, spelled in bytes, and what stands for all ids before them."""

    parent: bytes
    ids: bytes

    @property
    def pages(self) -> int:
        return len(self.ids) // _PAGE

    @property
    def key(self) -> bytes:
        """What stands for all ids up to the end of this block."""
        return blake2b(self.parent + self.ids, digest_size=len(ROOT)).digest()

    @property
    def name(self) -> str:
        return f"{self.parent.hex()}-{self.key.hex()}.kv"

    def shared(self, ids: bytes) -> int:
        """How many of its pages `ids` begin with."""
        starts = range(0, len(self.ids), _PAGE)
        differs = (at // _PAGE for at in starts if self.ids[at : at + _PAGE] != ids[at : at + _PAGE])
        return next(differs, self.pages)


def spelled(ids: Sequence[int]) -> bytes:
    return np.array(ids, "<i4").tobytes()


def blocks_of(ids: Sequence[int]) -> Iterator[Block]:
    """The whole pages of `ids`, block by block."""
    parent, whole = ROOT, spelled(ids[: len(ids) // PAGE_SIZE * PAGE_SIZE])
    for start in range(0, len(whole), _BLOCK):
        block = Block(parent, whole[start : start + _BLOCK])
        yield block
        parent = block.key


class Header(NamedTuple):
    """What a file says of itself."""

    block: Block
    page_bytes: int
    sums: tuple[int, ...]  # crc32 of every page

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.block.pages * self.page_bytes


class Held(NamedTuple):
    """A file whose block's first `pages` pages are some sequence's."""

    header: Header
    pages: int


def encode(header: Header, model: bytes) -> bytes:
    """HEADER_BYTES bytes; `model` is 32."""
    block = header.block
    fixed = _FIXED.pack(MAGIC, model, block.parent, block.pages, header.page_bytes)
    sums = struct.pack(f"<{block.pages}I", *header.sums)
    body = (fixed + block.ids + sums).ljust(HEADER_BYTES - 4, b"\0")
    return body + zlib.crc32(body).to_bytes(4, "little")


def decode(data: bytes, model: bytes) -> Header:
    """The inverse of `encode`. Raises ValueError, saying what is wrong with `data`."""
    if len(data) != HEADER_BYTES or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("its header is damaged")
    magic, of, parent, pages, page_bytes = _FIXED.unpack_from(data)
    if magic != MAGIC or not 1 <= pages <= BLOCK_PAGES:
        raise ValueError("it is of another format")
    if of != model:
        raise ValueError("it is of another model")
    start = _FIXED.size + pages * _PAGE
    block = Block(parent, data[_FIXED.size : start])
    return Header(block, page_bytes, struct.unpack_from(f"<{pages}I", data, start))


class BlockFiles:
    """Those of one model, in a directory beside those of others. Any number of processes and threads may use them."""

    def __init__(self, root: Path, model: bytes, page_bytes: int, budget: int) -> None:
        """`model`, 32 bytes, stands for all that rows depend on but their ids; all models' files together take
        `budget` bytes. The directory is made when something is written.
        """
        self.root, self.directory = root, root / model.hex()[:32]
        self.model, self.page_bytes, self.budget = model, page_bytes, budget
        self._known: dict[str, Header] = {}
        self.dropped = 0  # files that could not be used
        self._sweep()

    # -- reading ----------------------------------------------------------------------------------------------------
    def find(self, ids: Sequence[int]) -> list[Held]:
        """The files with the longest beginning of `ids`, in order."""
        listed, found, parent, whole = self._listed(), list[Held](), ROOT, spelled(ids)
        for start in range(0, len(whole), _BLOCK):
            rest = whole[start : start + _BLOCK]
            headers = [header for name in listed[parent] if (header := self._header(name)) is not None]
            held = [Held(header, header.block.shared(rest)) for header in headers]
            best = max(held, key=lambda each: each.pages, default=None)
            if best is None or not best.pages:
                break
            found.append(best)
            if best.pages < BLOCK_PAGES:
                break
            parent = best.header.block.key
        return found

    def path(self, block: Block) -> Path:
        return self.directory / block.name

    def touch(self, found: Sequence[Held], now: int) -> None:
        """Note that files of one sequence were used, at `now` in nanoseconds: of them the last will go first."""
        for depth, each in enumerate(found):
            with suppress(OSError):  # another process may have removed it
                _stamp(self.path(each.header.block), now - depth * STEP)

    def drop(self, name: str, why: str) -> None:
        """Remove a file that cannot be used."""
        self._known.pop(name, None)
        try:
            (self.directory / name).unlink()
        except OSError as error:
            log.debug("%s: %s; it stays: %s", name, why, error)
        else:
            self.dropped += 1
            log.warning("%s was removed: %s.", self.directory / name, why)

    def usage(self) -> tuple[list[int], int]:
        """Bytes of each block of this model, and of all files of all models. Looks at every file: milliseconds."""
        blocks, used = [], 0
        for path, status in _files(self.root):
            used += status.st_size
            if path.parent == self.directory and path.suffix == ".kv":
                blocks.append(status.st_size)
        return blocks, used

    # -- writing ----------------------------------------------------------------------------------------------------
    def write(self, block: Block, rows: np.ndarray, used: int) -> None:
        """Keep uint8 `rows` [pages, page_bytes] of `block` as used at `used`, unless that is there already or would
        cost something used later. Raises OSError when the disk refuses.
        """
        header = Header(block, self.page_bytes, tuple(zlib.crc32(page.data) for page in rows))
        if self._longer(block) or not self._make_room(header.file_bytes, used):
            return
        self._make_directories()
        with suppress(FileNotFoundError), self._unfinished() as (file, path):  # whoever empties the cache may do so now
            file.write(encode(header, self.model))
            file.write(rows.data)
            file.flush()
            _stamp(path, used)
            os.replace(path, self.path(block))
        self._remove_shorter(block)

    @contextmanager
    def _unfinished(self) -> Iterator[tuple[BinaryIO, Path]]:
        """A file that only its owner may read, gone in the end unless it was given another name."""
        descriptor, name = tempfile.mkstemp(dir=self.directory, suffix=UNFINISHED)
        try:
            with os.fdopen(descriptor, "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file, Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def _make_room(self, size: int, used: int) -> bool:
        """Remove what was used before `used`, longest ago first, until `size` bytes fit; False if they do not."""
        files = sorted((status.st_mtime_ns, status.st_size, path) for path, status in _files(self.root))
        excess = sum(bytes_ for _, bytes_, _ in files) + size - self.budget
        older = [each for each in files if each[0] < used and each[2].suffix != UNFINISHED]
        if excess > sum(bytes_ for _, bytes_, _ in older):
            return False
        for _, bytes_, path in older:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= bytes_
        return True

    def _longer(self, block: Block) -> bool:
        """Whether there is a file with all of `block`."""
        headers = (self._header(name) for name in self._listed()[block.parent])
        return any(header is not None and header.block.shared(block.ids) == block.pages for header in headers)

    def _remove_shorter(self, block: Block) -> None:
        """Remove files that hold only the beginning of `block`."""
        for name in self._listed()[block.parent]:
            header = self._header(name)
            if header is not None and block.pages > header.block.pages == header.block.shared(block.ids):
                self.path(header.block).unlink(missing_ok=True)

    # -- the directory ----------------------------------------------------------------------------------------------
    def _make_directories(self) -> None:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        for each in (self.root, self.directory):
            each.mkdir(mode=0o700, exist_ok=True)

    def _sweep(self) -> None:
        """Remove what dead processes left unfinished, and of this model's files those that cannot be used."""
        for path, _ in _files(self.root):
            if path.suffix == UNFINISHED and not _is_locked(path):
                path.unlink(missing_ok=True)
        for name in chain.from_iterable(self._listed().values()):
            self._header(name)

    def _listed(self) -> dict[bytes, list[str]]:
        """Names by the key of what is before them. Drops what cannot be one of ours."""
        listed: dict[bytes, list[str]] = defaultdict(list)
        for path in _regular(self.directory):
            match = _NAME.fullmatch(path.name)
            if match is not None:
                listed[bytes.fromhex(match[1])].append(path.name)
            elif path.suffix != UNFINISHED:
                self.drop(path.name, "no file here is called so")
        return listed

    def _header(self, name: str) -> Header | None:
        """What the file `name` says of itself; None, and it is dropped, if that cannot be."""
        if name not in self._known:
            try:
                self._known[name] = self._read_header(name)
            except FileNotFoundError:
                return None
            except (OSError, ValueError) as error:
                self.drop(name, str(error))
                return None
        return self._known[name]

    def _read_header(self, name: str) -> Header:
        with (self.directory / name).open("rb") as file:
            header = decode(file.read(HEADER_BYTES), self.model)
            if header.page_bytes != self.page_bytes or header.block.name != name:
                raise ValueError("it is something else than its name says")
            if os.fstat(file.fileno()).st_size != header.file_bytes:
                raise ValueError("it has the wrong length")
        return header


def bytes_in(root: Path) -> int:
    """Bytes of all files of all models."""
    return sum(status.st_size for _, status in _files(root))


def _files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything in the directories in `root`, but for what goes away meanwhile."""
    for directory in _entries(root):
        for path in _regular(Path(directory.path)) if directory.is_dir(follow_symlinks=False) else ():
            with suppress(OSError):
                yield path, path.stat()


def _regular(directory: Path) -> Iterator[Path]:
    return (Path(entry.path) for entry in _entries(directory) if entry.is_file(follow_symlinks=False))


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """None where there is no such directory, or it cannot be read."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:
        return []


def _stamp(path: Path, used: int) -> None:
    os.utime(path, ns=(used, used))


def _is_locked(path: Path) -> bool:
    """Whether a living process holds the file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
