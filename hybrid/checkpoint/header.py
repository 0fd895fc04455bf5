"""The safetensors container: an 8-byte little-endian length, that many bytes of JSON, then the tensor data.

Parsed here rather than by a library because every field of a damaged file must end in one clear line, and because
opening thousands of tensors must cost microseconds each. A `Header` that `read_header` returns has been checked: every
tensor lies inside the file, has the bytes its shape and dtype ask for, and overlaps no other.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.errors import CheckpointError

ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
# The format's own bound; a corrupt length must not become an allocation.
MAX_HEADER_BYTES = 100_000_000


class Entry(NamedTuple):
    """One tensor: dtype as safetensors spells it, shape, and its bytes [start, end) from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Header(NamedTuple):
    """A checked shard header: entries by stored name, and where the data begins."""

    path: Path
    data_start: int
    entries: dict[str, Entry]


def read_header(path: Path) -> Header:
    """Read and check one shard's header. Raises CheckpointError naming the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise damaged(path, f"its header claims {length:,} bytes in a file of {size:,}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}.", REFETCH) from error
    entries = _parse(path, text, 8 + length)
    _check_layout(path, entries, 8 + length, size)
    return Header(path, 8 + length, entries)


REFETCH = "Fetch this file again (kimi-local pull resumes and keeps what is whole)."


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file whose bytes cannot be right."""
    return CheckpointError(f"{path} is damaged: {what}.", REFETCH)


def _parse(path: Path, text: bytes, data_start: int) -> dict[str, Entry]:
    try:
        raw = json.loads(text)
        if isinstance(raw, dict) and text.count(b'"data_offsets"') != len(raw.keys() - {"__metadata__"}):
            json.loads(text, object_pairs_hook=_refuse_repeated(path))
    except (ValueError, RecursionError) as error:
        raise damaged(path, "the header is not JSON") from error
    if not isinstance(raw, dict):
        raise damaged(path, "the header is not a JSON object")
    raw.pop("__metadata__", None)
    return {name: _entry(path, name, spec, data_start) for name, spec in raw.items()}


def _refuse_repeated(path: Path) -> Callable[[list[tuple[str, Any]]], None]:
    """A JSON hook that raises for a name given twice. Slow, hence only called where counting shows that it might be."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise damaged(path, f"the header names {twice} twice")

    return check


def _entry(path: Path, name: str, spec: Any, data_start: int) -> Entry:
    try:
        dtype, shape, (start, end) = spec["dtype"], tuple(spec["shape"]), spec["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"the header entry of {name} is malformed") from error
    numbers = (*shape, start, end)
    if set(map(type, numbers)) != {int} or min(numbers) < 0 or len(shape) > 8:
        raise damaged(path, f"the header entry of {name} has shape {list(shape)} and offsets {[start, end]}")
    size = ITEMSIZE.get(dtype) if isinstance(dtype, str) else None
    if size is None:
        raise damaged(path, f"{name} has the unknown dtype {dtype!r}")
    wanted = math.prod(shape) * size
    if end - start != wanted:
        raise damaged(path, f"{name} occupies {end - start:,} bytes, {dtype} {list(shape)} needs {wanted:,}")
    return Entry(dtype, shape, data_start + start, data_start + end)


def _check_layout(path: Path, entries: dict[str, Entry], data_start: int, size: int) -> None:
    position, previous = data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start < position:
            raise damaged(path, f"{name} overlaps {previous}")
        if entry.start > position:
            raise damaged(path, f"{entry.start - position:,} stray bytes lie before {name}")
        position, previous = entry.end, name
    if position > size:
        raise damaged(path, f"it is cut short at {size:,} of {position:,} bytes")
    if position < size:
        raise damaged(path, f"{size - position:,} stray bytes follow the last tensor")
