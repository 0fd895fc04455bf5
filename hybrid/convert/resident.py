"""The tensors every token needs, written as stored or with their large matrices in int8 or INT4.

Embedding, norms, router, image tower and `kv_b_proj`, which attention folds into queries and outputs, stay as stored.
The head keeps eight bits where the rest gets four: its errors reach the choice of a token directly.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import torch

from hybrid.checkpoint import Checkpoint
from hybrid.checkpoint.durable import move_durably
from hybrid.checkpoint.header import ITEMSIZE, Entry
from hybrid.checkpoint.hf import is_absorbed, loaded_bytes
from hybrid.checkpoint.manifest import ResidentRecord
from hybrid.checkpoint.write import write_header
from hybrid.config import ModelConfig
from quant import int4_g32, int8_g32

STORED = {"bf16": 16.0, "int8": int8_g32.BITS_PER_WEIGHT, "int4": int4_g32.BITS_PER_WEIGHT}  # choices and their bits
GROUP = 32
ROWS_AT_ONCE = 2048  # of a matrix that is encoded: 59 MB of fp32 for K2.5's widest

Layout = dict[str, Entry]  # in the order of the file, places counted from the first tensor


def layout(checkpoint: Checkpoint, names: Iterable[str], choice: str) -> Layout:
    """What one resident file will hold of the tensors `names`; `choice` is a key of STORED."""
    kept: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        prefix, _, suffix = name.rpartition(".")
        format = _format(prefix, choice) if suffix in ("weight", "weight_scale_inv") else None
        if format is None or checkpoint.entry(f"{prefix}.weight").shape[1] % GROUP:
            kept[name] = checkpoint.entry(name)[:2]
        elif suffix == "weight":
            kept |= _coded(prefix, format, checkpoint.entry(name).shape)
    return _placed(kept)


def _format(prefix: str, choice: str) -> str | None:
    """ "int8" or "int4" for the weight of a projection or the head; None for what stays as stored."""
    if choice == "bf16" or is_absorbed(f"{prefix}."):
        return None
    if prefix == "lm_head":
        return "int8"
    return choice if prefix.startswith("layers.") and "_proj" in prefix.rpartition(".")[2] else None


def _coded(prefix: str, format: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    rows, columns = shape
    scales = {f"{prefix}.weight_scale": ("BF16", (rows, columns // GROUP))}
    if format == "int8":
        return {f"{prefix}.weight_int8": ("I8", (rows, columns)), **scales}
    packed = {f"{prefix}.weight_packed": ("I32", (rows, columns // 8)), f"{prefix}.weight_shape": ("I32", (2,))}
    return packed | scales


def _placed(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Layout:
    # Widest elements first, as the safetensors library orders them: every tensor then starts aligned.
    order = sorted(tensors.items(), key=lambda item: (-ITEMSIZE[item[1][0]], item[0]))
    places, end = {}, 0
    for name, (dtype, shape) in order:
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * ITEMSIZE[dtype]
        places[name] = Entry(dtype, shape, start, end)
    return places


def file_bytes(places: Layout) -> int:
    """Bytes of the tensors of a file."""
    return sum(entry.nbytes for entry in places.values())


def memory_bytes(config: ModelConfig, layouts: Iterable[Layout]) -> int:
    """Memory the resident tensors of a text model take once loaded."""
    return loaded_bytes(config, ((name, entry) for places in layouts for name, entry in places.items()))["resident"]


def write_resident(checkpoint: Checkpoint, places: Layout, path: Path, pool: Executor) -> ResidentRecord:
    """Write one resident file, whole or not at all."""
    entries = {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.end]}
        for name, entry in places.items()
    }
    temporary = path.with_name(f"{path.name}.partial")
    crcs: dict[str, int] = {}
    with temporary.open("wb") as file:
        data_start = write_header(file, entries)
        for name, data in _contents(checkpoint, places, pool):
            crcs[name] = zlib.crc32(data)
            file.write(data)
    with temporary.open("rb") as file:
        header = zlib.crc32(file.read(data_start))
    move_durably(temporary, path)
    return ResidentRecord(path.name, path.stat().st_size, header, crcs)


def _contents(checkpoint: Checkpoint, places: Layout, pool: Executor) -> Iterator[tuple[str, memoryview]]:
    """Every tensor's bytes, in order."""
    made: dict[str, np.ndarray] = {}
    for name in places:
        if checkpoint.has(name):
            yield name, _bytes(checkpoint.tensor(name))
            continue
        prefix = name.rpartition(".")[0]
        if name not in made:
            encode = _int8 if f"{prefix}.weight_int8" in places else _int4
            made |= encode(prefix, checkpoint.linear(prefix), pool)
        yield name, made.pop(name).reshape(-1).view(np.uint8).data


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _int8(prefix: str, weight: torch.Tensor, pool: Executor) -> dict[str, np.ndarray]:
    codes, scales = _encoded(int8_g32.encode, weight, pool)
    return {f"{prefix}.weight_int8": codes, f"{prefix}.weight_scale": scales}


def _int4(prefix: str, weight: torch.Tensor, pool: Executor) -> dict[str, np.ndarray]:
    packed, scales = _encoded(int4_g32.encode, weight, pool)
    shape = np.array(weight.shape, "<i4")
    return {f"{prefix}.weight_packed": packed, f"{prefix}.weight_scale": scales, f"{prefix}.weight_shape": shape}


Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def _encoded(encode: Encode, weight: torch.Tensor, pool: Executor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a matrix, encoded in bands of rows: each row is its own."""
    bands = pool.map(lambda band: encode(band.float().numpy()), weight.split(ROWS_AT_ONCE))
    codes, scales = zip(*bands, strict=True)
    return np.concatenate(codes), np.concatenate(scales)
