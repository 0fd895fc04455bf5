"""Writing a checkpoint in the released layout: numbered shards, an index, configuration files, checksums.

Everything goes to a temporary sibling directory which is renamed into place once, at the end: a directory that exists
is complete.
"""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch

from hybrid.checkpoint.durable import sync
from hybrid.checkpoint.names import is_vision
from hybrid.errors import CheckpointError

INDEX = "model.safetensors.index.json"
CHECKSUMS = "checksums.json"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_SPELLING = {dtype: name for name, dtype in DTYPES.items()}

# The quantization_config that goes with `CheckpointWriter.add_int4`.
INT4_QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "type": "int", "num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True,
                "dynamic": False, "actorder": None, "observer": "minmax",
            },
            "input_activations": None,
            "output_activations": None,
        }
    },
    "ignore": [
        "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
}  # fmt: skip


class CheckpointWriter:
    """Streams tensors into shards of at most `max_shard_bytes`; `finish` puts the directory in place.

    Names given to `add` are normalised ("layers.0.self_attn.o_proj.weight"); on disk the text model stands under
    `prefix` and the head under `head_prefix`. Used as a context manager, an exception removes all that was written.
    Raises CheckpointError if `directory` already exists and is not empty.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        prefix: str = "language_model.model.",
        head_prefix: str = "language_model.",
        max_shard_bytes: int = 2**30,
    ) -> None:
        self.directory = Path(directory)
        self._prefix, self._head_prefix = prefix, head_prefix
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, int]] = []  # per shard: stored name -> bytes
        self._checksums: dict[str, str] = {}
        _refuse_existing(self.directory)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        name = f".{self.directory.name}.partial-"
        self.staging = Path(tempfile.mkdtemp(prefix=name, dir=self.directory.parent))

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.abort()

    def abort(self) -> None:
        """Remove what was written so far; does nothing after `finish`."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def stored_name(self, name: str) -> str:
        """The name on disk for a normalised name."""
        if is_vision(name):
            return name
        return (self._head_prefix if name.startswith("lm_head.") else self._prefix) + name

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Store `tensor` as it is. Kept by reference until its shard is full; do not change it afterwards."""
        stored = self.stored_name(name)
        assert stored not in self._checksums and stored not in self._pending, f"{stored} was added twice"
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_shard_bytes:
            self._write_shard()
        self._pending[stored] = tensor.detach().to("cpu").contiguous()
        self._pending_bytes += size

    def add_int4(self, name: str, codes: np.ndarray, scales: torch.Tensor) -> None:
        """Store a linear as INT4: `codes` int8 [out, in] in -8..7, `scales` bfloat16 [out, in // group_size]."""
        rows, columns = codes.shape
        assert scales.dtype == torch.bfloat16 and scales.shape[0] == rows and columns % scales.shape[1] == 0
        self.add(f"{name}.weight_packed", torch.from_numpy(pack_int4(codes)))
        self.add(f"{name}.weight_scale", scales)
        self.add(f"{name}.weight_shape", torch.tensor([rows, columns], dtype=torch.int32))

    def add_int8(self, name: str, codes: np.ndarray, scales: torch.Tensor) -> None:
        """Store a resident linear as int8: `codes` int8 [out, in], `scales` bfloat16 [out, in // 32]."""
        rows, columns = codes.shape
        assert codes.dtype == np.int8 and scales.dtype == torch.bfloat16 and columns % 32 == 0
        assert scales.shape == (rows, columns // 32), (codes.shape, scales.shape)
        self.add(f"{name}.weight_int8", torch.from_numpy(codes))
        self.add(f"{name}.weight_scale", scales)

    def finish(self, files: Mapping[str, str | bytes]) -> Path:
        """Write the last shard, index, checksums and `files`, flush all to disk and rename into place."""
        if self._pending:
            self._write_shard()
        self._write_index()
        checksums = {"algorithm": "crc32", "tensors": self._checksums}
        for name, content in {**files, CHECKSUMS: json.dumps(checksums, indent=0) + "\n"}.items():
            data = content.encode() if isinstance(content, str) else content
            (self.staging / name).write_bytes(data)
        for path in self.staging.iterdir():
            sync(path)
        self.staging.chmod(0o755)
        sync(self.staging)
        _refuse_existing(self.directory)
        os.rename(self.staging, self.directory)
        sync(self.directory.parent)
        return self.directory

    def _write_shard(self) -> None:
        # Widest elements first, as the safetensors library orders them: every tensor then starts aligned.
        order = sorted(self._pending.items(), key=lambda item: (-item[1].element_size(), item[0]))
        entries: dict[str, Any] = {}
        position = 0
        for name, tensor in order:
            end = position + tensor.numel() * tensor.element_size()
            spelling = _SPELLING[tensor.dtype]
            entries[name] = {"dtype": spelling, "shape": list(tensor.shape), "data_offsets": [position, end]}
            position = end
        with (self.staging / f"shard-{len(self._shards) + 1:05}").open("wb") as file:
            write_header(file, entries)
            for name, tensor in order:
                data = tensor.reshape(-1).view(torch.uint8).numpy().data
                self._checksums[name] = f"{zlib.crc32(data):08x}"
                file.write(data)
        self._shards.append({name: tensor.numel() * tensor.element_size() for name, tensor in order})
        self._pending, self._pending_bytes = {}, 0

    def _write_index(self) -> None:
        """Give the shards their final names, which hold their number, and write the index."""
        weight_map: dict[str, str] = {}
        for i, sizes in enumerate(self._shards, 1):
            shard = shard_name(i, len(self._shards))
            os.rename(self.staging / f"shard-{i:05}", self.staging / shard)
            weight_map |= dict.fromkeys(sizes, shard)
        total = sum(sum(sizes.values()) for sizes in self._shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def shard_name(number: int, total: int) -> str:
    """File name of a shard in the released spelling: five digits, of six."""
    return f"model-{number:05}-of-{total:06}.safetensors"


def write_header(file: BinaryIO, entries: Mapping[str, Any]) -> int:
    """Write a safetensors header for `entries` (JSON form); returns where the data begins, a multiple of 8."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return file.write(len(text).to_bytes(8, "little") + text)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """int8 codes [out, in] in -8..7 -> int32 [out, in // 8]: offset by 8, eight to a word, lowest nibble first."""
    assert codes.dtype == np.int8 and codes.shape[1] % 8 == 0 and codes.min() >= -8 and codes.max() <= 7
    nibbles = (codes + 8).astype(np.uint8)
    packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return np.ascontiguousarray(packed).view("<i4")


def _refuse_existing(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} already exists.", "Choose another directory or remove this one.")
