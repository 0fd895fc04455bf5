"""Ways to damage a checkpoint directory, for tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARD = "model-00001-of-000001.safetensors"


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def header_of(shard: Path) -> dict[str, Any]:
    data = shard.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def rewrite_header(shard: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply `change` to a shard's JSON header and leave its data alone."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def tensor_offset(shard: Path, name: str) -> int:
    """Where a tensor's first byte lies in the file."""
    data_start = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    return data_start + header_of(shard)[name]["data_offsets"][0]


def overwrite(shard: Path, offset: int, data: bytes) -> None:
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def append(shard: Path, data: bytes) -> None:
    with shard.open("ab") as file:
        file.write(data)


def flip_byte(shard: Path, name: str, index: int = 5, mask: int = 1) -> None:
    """Change one bit of a tensor's byte `index`."""
    offset = tensor_offset(shard, name) + index
    byte = shard.read_bytes()[offset]
    overwrite(shard, offset, bytes([byte ^ mask]))
