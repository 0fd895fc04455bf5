"""Calibration directories: what a text made of a model's experts, one safetensors file per layer of experts.

`calibration.json` says of which model, from which text; it appears last, so a directory that has it is complete. Until
then the same facts stand in `unfinished.json`, beside the residual stream from which the next layer goes on.

Second moments are symmetric; the files hold their upper triangles, row after row, in fp32: half the bytes of the full
matrix, and nothing is rounded.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from hybrid.checkpoint.durable import move_durably, sync
from hybrid.checkpoint.header import ITEMSIZE, Header, damaged, read_header
from hybrid.checkpoint.hf import Checkpoint, map_file, read_json
from hybrid.checkpoint.write import write_header
from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError, UsageError

FORMAT_VERSION = 1
COMPLETE, UNFINISHED = "calibration.json", "unfinished.json"
FULL_HESSIAN_BYTES = 8 << 30  # up to which every expert's inner second moments are kept whole
_NUMPY: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
_SPELLING = {dtype: name for name, dtype in _NUMPY.items()}
AGAIN = "Run kimi-local calibrate again, into a new directory."


class LayerStatistics(NamedTuple):
    """One layer of experts over all calibration tokens; fp32 where not said. x is the layer's normed input.

    An expert's inner activations h = silu(gate x) * (up x) and its outputs carry its weight g in the router's sum.
    Experts that no token chose have zeros.
    """

    counts: np.ndarray  # int64 [experts]: tokens that chose the expert
    mass: np.ndarray  # [experts]: sum of g over them
    hessian_x: np.ndarray  # [hidden, hidden]: mean over all tokens of x x^T
    importance_h: np.ndarray  # [experts, intermediate]: mean over the expert's tokens of (g h)^2
    hessian_h: np.ndarray | None  # [experts, intermediate, intermediate]: mean over them of (g h)(g h)^T
    residual_ms: float  # mean over all tokens of |r|^2, r the residual stream that enters the layer
    output_ms: np.ndarray  # [experts]: mean over the expert's tokens of |g output|^2


@dataclass(frozen=True)
class Manifest:
    """calibration.json."""

    model: str
    fingerprint: str
    tokens: int
    sequence: int  # tokens that see each other
    texts: list[dict[str, str]]  # name and sha256 of each file
    layers: list[int]  # that have experts, and so a file
    hessian_h: str  # full | diagonal: whether inner second moments are whole or `importance_h` alone
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


class Calibration:
    """A complete calibration directory, read layer by layer; see `open_calibration`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have statistics."""
        return tuple(self.manifest.layers)

    def layer(self, layer: int) -> LayerStatistics:
        """The statistics of one of `layers`. Raises CheckpointError if its file is missing or damaged."""
        assert layer in self.manifest.layers, layer
        path = self.path / layer_file(layer)
        found = read_arrays(path)
        hessian_h = found.pop("hessian_h", None)
        missing = sorted({*LayerStatistics._fields} - {"hessian_h"} - found.keys())
        if missing or (hessian_h is None) == (self.manifest.hessian_h == "full"):
            raise _unusable(damaged(path, f"it lacks {missing[0] if missing else 'hessian_h'}"))
        return LayerStatistics(
            found["counts"],
            found["mass"],
            unpack_symmetric(found["hessian_x"]),
            found["importance_h"],
            None if hessian_h is None else unpack_symmetric(hessian_h),
            float(found["residual_ms"][0]),
            found["output_ms"],
        )

    def require_match(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless this was made with the weights and the configuration of `checkpoint`."""
        if self.manifest.fingerprint != fingerprint(checkpoint):
            raise CheckpointError(
                f"{self.path} was made with another model ({self.manifest.model}) than {checkpoint.path}.",
                f"Make one for it: kimi-local calibrate {checkpoint.path} --text FILE -o DIR",
            )


def open_calibration(path: Path | str) -> Calibration:
    """Open a directory that `kimi-local calibrate` finished. Raises CheckpointError if it is none, or too new."""
    directory = Path(path).expanduser()
    if not (directory / COMPLETE).is_file():
        if (directory / UNFINISHED).is_file():
            raise CheckpointError(f"The calibration {path} is unfinished.", "The same calibrate command continues it.")
        raise CheckpointError(f"{path} is no calibration.", "Make one: kimi-local calibrate MODEL --text FILE -o DIR")
    return Calibration(directory, _manifest(directory / COMPLETE))


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 of the configuration and the final norm: the same for every copy, another for every other training."""
    digest = hashlib.sha256(json.dumps(checkpoint.raw_config, sort_keys=True).encode())
    digest.update(checkpoint.tensor("norm.weight").float().numpy().tobytes())
    return digest.hexdigest()


def keeps_full_hessians(config: ModelConfig) -> bool:
    """Whether the inner second moments of all experts are small enough to be kept whole."""
    return config.num_experts * config.moe_intermediate_size**2 * 4 <= FULL_HESSIAN_BYTES


def file_bytes(config: ModelConfig) -> int:
    """Bytes of one layer's file, header not counted."""
    inner = config.moe_intermediate_size
    per_expert = 16 + 4 * (inner + (_triangle(inner) if keeps_full_hessians(config) else 0))
    return 4 * _triangle(config.hidden_size) + config.n_routed_experts * per_expert


def layer_file(layer: int) -> str:
    return f"layer-{layer:03}.safetensors"


class CalibrationWriter:
    """A calibration directory in the making: files appear whole, and what is there is never made again."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Start, or continue what was started with the same manifest. Raises UsageError for other contents."""
        self.directory = directory
        self.manifest = manifest
        self._require_same()
        directory.mkdir(parents=True, exist_ok=True)
        if not self.is_complete:
            with _appearing(directory / UNFINISHED) as file:
                file.write(manifest.to_json().encode())

    @property
    def is_complete(self) -> bool:
        return (self.directory / COMPLETE).is_file()

    def write_layer(self, layer: int, statistics: LayerStatistics) -> None:
        arrays = statistics._asdict() | {"residual_ms": np.array([statistics.residual_ms], np.float32)}
        arrays["hessian_x"] = pack_symmetric(statistics.hessian_x)
        if statistics.hessian_h is None:
            del arrays["hessian_h"]
        else:
            arrays["hessian_h"] = pack_symmetric(statistics.hessian_h)
        write_arrays(self.directory / layer_file(layer), arrays)

    def write_residual(self, done: int, h: np.ndarray) -> None:
        """Keep the residual stream fp32 [tokens, hidden] behind layer `done` - 1, in place of any other."""
        write_arrays(self._residual(done), {"h": h})
        for path in self._residuals():
            if path != self._residual(done):
                path.unlink()

    def read_residual(self) -> tuple[int, np.ndarray] | None:
        """(layers done, residual stream) of the run to continue, None if it must start at the first layer."""
        found = self._residuals()
        return (int(found[-1].stem.rpartition("-")[2]), read_arrays(found[-1])["h"]) if found else None

    def finish(self) -> Path:
        """Declare the directory complete; returns it."""
        if not self.is_complete:
            os.rename(self.directory / UNFINISHED, self.directory / COMPLETE)
            sync(self.directory)
        for path in self._residuals():
            path.unlink()
        return self.directory

    def _residual(self, done: int) -> Path:
        return self.directory / f"residual-{done:03}.safetensors"

    def _residuals(self) -> list[Path]:
        return sorted(self.directory.glob("residual-*.safetensors"))

    def _require_same(self) -> None:
        present = [name for name in (COMPLETE, UNFINISHED) if (self.directory / name).is_file()]
        if present:
            if _manifest(self.directory / present[0]) != self.manifest:
                raise UsageError(
                    f"{self.directory} holds a calibration of another model or text.", "Choose another directory."
                )
        elif self.directory.is_dir() and any(self.directory.iterdir()):
            raise UsageError(f"{self.directory} is not empty.", "Choose another directory.")


# -- files ------------------------------------------------------------------------------------------------------------
def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A safetensors file of fp32 and int64 arrays, whole or not at all."""
    # Widest elements first, so that every array starts aligned.
    order = sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))
    entries: dict[str, Any] = {}
    end = 0
    for name, array in order:
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": _SPELLING[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    with _appearing(path) as file:
        write_header(file, entries)
        for _, array in order:
            file.write(np.ascontiguousarray(array).data)


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name when it is whole and on the disk, in place of one that had it; on an error
    nothing of it stays."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
        move_durably(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that `write_arrays` wrote, views of its mapping. Raises CheckpointError."""
    try:
        header = read_header(path)
        content = map_file(path)
    except CheckpointError as error:
        raise _unusable(error) from error
    return {name: _array(header, content, name) for name in header.entries}


def _array(header: Header, content: np.ndarray, name: str) -> np.ndarray:
    dtype, shape, start, end = header.entries[name]
    if dtype not in _NUMPY or start % ITEMSIZE[dtype]:
        raise _unusable(damaged(header.path, f"{name} cannot be read as {dtype}"))
    return np.frombuffer(content[start:end], _NUMPY[dtype]).reshape(shape)


def _unusable(error: CheckpointError) -> CheckpointError:
    return CheckpointError(error.message, AGAIN)


def _manifest(path: Path) -> Manifest:
    content = read_json(path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, not {FORMAT_VERSION}.", AGAIN)
    try:
        return Manifest(**content)
    except TypeError as error:
        raise _unusable(damaged(path, "its fields are not those of a calibration")) from error


# -- triangles --------------------------------------------------------------------------------------------------------
def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def pack_symmetric(full: np.ndarray) -> np.ndarray:
    """[..., n, n] -> the upper triangles [..., n (n + 1) / 2], row after row."""
    return np.concatenate([full[..., row, row:] for row in range(full.shape[-1])], axis=-1)


def unpack_symmetric(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_symmetric`."""
    n = (math.isqrt(8 * packed.shape[-1] + 1) - 1) // 2
    full = np.empty((*packed.shape[:-1], n, n), packed.dtype)
    start = 0
    for row in range(n):
        part = packed[..., start : start + n - row]
        full[..., row, row:] = part
        full[..., row:, row] = part
        start += n - row
    return full
