"""Reading a checkpoint as released: a directory with config.json and safetensors shards.

Shards are mapped, not read: a tensor or an expert is a view of the page cache, and asking for one costs microseconds.
The mapping is private and writable, so kernels compiled for ordinary arrays accept the views; nothing writes to them.
"""

import json
import math
import mmap
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch

from hybrid.checkpoint.expected import FLOATS, expected_tensors
from hybrid.checkpoint.header import ITEMSIZE, REFETCH, Entry, Header, damaged, read_header
from hybrid.checkpoint.names import expert_prefix, is_vision, layer_of, normalise
from hybrid.checkpoint.write import DTYPES, INDEX
from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError

SINGLE = "model.safetensors"
# A group of 32 weights shares a scale in the kernels' layout; larger groups on disk repeat theirs.
KERNEL_GROUP = 32


class Int4Weight(NamedTuple):
    """One INT4 matrix as stored, without a copy.

    `packed` uint8 [out, in // 2]: low nibble = even column, high nibble = odd; weight = (nibble - 8) * scale.
    `scales` uint16 [out, in // 32]: bits of bfloat16.
    """

    packed: np.ndarray
    scales: np.ndarray


class Int8Weight(NamedTuple):
    """One int8 matrix as stored, without a copy; weight = code * scale.

    `codes` int8 [out, in]; `scales` uint16 [out, in // 32]: bits of bfloat16.
    """

    codes: np.ndarray
    scales: np.ndarray


Weight = Int4Weight | torch.Tensor


class Expert(NamedTuple):
    """The three matrices of a routed expert, each INT4 or a bfloat16 tensor [out, in]."""

    gate: Weight
    up: Weight
    down: Weight


class Located(NamedTuple):
    """Where a tensor lies: its shard and its header entry."""

    shard: Path
    entry: Entry


class Checkpoint:
    """Read-only weights under normalised names ("layers.3.mlp.experts.7.gate_proj.weight_packed")."""

    def __init__(self, path: Path, raw: dict[str, Any], generation: dict[str, Any], headers: list[Header]) -> None:
        self.path = path
        self.raw_config = raw
        self.generation_config = generation
        self.config = ModelConfig.from_dict(raw, generation)
        self._tensors = locate(headers)
        self._maps: dict[Path, np.ndarray] = {}

    @property
    def reasons(self) -> bool:
        """Whether replies reason first unless told otherwise; generation_config may say that this model cannot."""
        return self.generation_config.get("thinking") is not False

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Forget the mappings; each is released when the last view of it is gone."""
        self._maps.clear()

    def release(self) -> None:
        """Give back the memory that reading took. Tensors that are views of the files stay what they are: their pages
        are mapped again when they are used."""
        for view in self._maps.values():
            assert isinstance(view.base, memoryview) and isinstance(view.base.obj, mmap.mmap)
            view.base.obj.madvise(mmap.MADV_DONTNEED)

    def names(self) -> list[str]:
        return list(self._tensors)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor. Raises CheckpointError if there is none."""
        return self._located(name).entry

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as stored: a view of the mapped file where its place in the file is aligned, else a copy."""
        located = self._located(name)
        dtype = DTYPES.get(located.entry.dtype)
        if dtype is None:
            raise damaged(located.shard, f"{name} has the unusable dtype {located.entry.dtype}")
        return torch.from_numpy(self._bytes(located)).view(dtype).reshape(located.entry.shape)

    def matrix(self, prefix: str) -> Int4Weight | Int8Weight | torch.Tensor:
        """The matrix of a linear as stored: INT4 or int8 codes with their scales, else a plain or fp8 tensor."""
        if self.has(f"{prefix}.weight_packed"):
            return self._int4(prefix)
        if self.has(f"{prefix}.weight_int8"):
            codes, scales = self._located(f"{prefix}.weight_int8"), self._located(f"{prefix}.weight_scale")
            bits = self._bytes(scales).view(np.uint16).reshape(scales.entry.shape)
            return Int8Weight(self._bytes(codes).view(np.int8).reshape(codes.entry.shape), bits)
        return self.tensor(f"{prefix}.weight")

    def linear(self, prefix: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The matrix [out, in] of a linear: as stored if it is a plain float, else decoded.

        INT4 and int8 to `dtype` (float32 holds their values exactly), fp8 to bfloat16.
        """
        weight = self.matrix(prefix)
        if isinstance(weight, Int4Weight):
            return decode_int4(weight, dtype)
        if isinstance(weight, Int8Weight):
            return decode_int8(weight, dtype)
        if weight.dtype != torch.float8_e4m3fn:
            return weight
        block = self.config.weight_block_size
        if block is None:
            raise CheckpointError(f"{prefix}.weight is fp8 but config.json gives no weight_block_size.", REFETCH)
        return decode_fp8(weight, self.tensor(f"{prefix}.weight_scale_inv"), block)

    def expert(self, layer: int, i: int) -> Expert:
        """Routed expert `i` of `layer`: INT4 matrices as zero-copy views, others as bfloat16 tensors."""
        at = expert_prefix(layer, i)
        return Expert(*(self._weight(f"{at}.{projection}_proj") for projection in ("gate", "up", "down")))

    def expert_format(self, layer: int) -> str:
        """ "int4_g32" or "bf16": the form in which `expert` gives this layer's matrices."""
        return "int4_g32" if self.has(f"{expert_prefix(layer, 0)}.gate_proj.weight_packed") else "bf16"

    def load_bytes(self, dtype_size: int = 2, packed: bool = True) -> dict[str, int]:
        """Bytes of memory the text model takes once loaded, from headers alone.

        "routed_experts" as they are kept (INT4 as stored, others as bfloat16); "resident" everything else at
        `dtype_size` bytes per weight, router in float32. With `packed` and bfloat16, which is how a CPU loads them by
        default, INT4 and int8 linears stay as stored.
        """
        entries = ((name, entry) for name, (_, entry) in self._tensors.items())
        return loaded_bytes(self.config, entries, dtype_size, packed)

    def _weight(self, prefix: str) -> Weight:
        if self.has(f"{prefix}.weight_packed"):
            return self._int4(prefix)
        return self.linear(prefix).to(torch.bfloat16)

    def _int4(self, prefix: str) -> Int4Weight:
        packed = self._located(f"{prefix}.weight_packed")
        scales = self._located(f"{prefix}.weight_scale")
        rows, words = packed.entry.shape
        bits = self._bytes(scales).view(np.uint16).reshape(scales.entry.shape)
        if self.config.group_size > KERNEL_GROUP:
            bits = np.repeat(bits, self.config.group_size // KERNEL_GROUP, axis=1)
        return Int4Weight(self._bytes(packed).reshape(rows, words * 4), bits)

    def _located(self, name: str) -> Located:
        found = self._tensors.get(name)
        if found is None:
            raise CheckpointError(f"{self.path} has no tensor {name}.", f"Check it: kimi-local doctor {self.path}")
        return found

    def _bytes(self, located: Located) -> np.ndarray:
        """One tensor's bytes as uint8: a view of the file, or a copy if they start off the alignment of the dtype."""
        shard, (dtype, _, start, end) = located
        if shard not in self._maps:
            self._maps[shard] = map_file(shard)
        view = self._maps[shard][start:end]
        return view.copy() if start % ITEMSIZE[dtype] else view


def map_file(path: Path) -> np.ndarray:
    """The whole file as a writable uint8 array over a private mapping."""
    # Without NORESERVE the kernel would count the private mapping against memory it could never need.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be mapped: {error}.", REFETCH) from error
    return np.frombuffer(mapped, dtype=np.uint8)


def loaded_bytes(
    config: ModelConfig, tensors: Iterable[tuple[str, Entry]], dtype_size: int = 2, packed: bool = True
) -> dict[str, int]:
    """Memory of a text model whose tensors (normalised names) these are; see `Checkpoint.load_bytes`."""
    routed = resident = 0
    for name, entry in tensors:
        layer = layer_of(name)
        if is_vision(name) or name.endswith(("weight_scale_inv", "weight_shape")) or is_unused_layer(config, layer):
            continue
        values = math.prod(entry.shape) * (8 if name.endswith("weight_packed") else 1)
        if ".mlp.experts." in name:
            routed += entry.nbytes if "weight_" in name else 2 * values
        elif packed and dtype_size == 2 and "weight_" in name and not is_absorbed(name):
            resident += entry.nbytes
        elif not name.endswith("weight_scale"):
            resident += values * (4 if ".mlp.gate." in name else dtype_size)
    return {"routed_experts": routed, "resident": resident}


def is_absorbed(name: str) -> bool:
    """Whether a tensor belongs to the projection that attention folds into queries and outputs: always decoded."""
    return ".kv_b_proj." in name


def is_unused_layer(config: ModelConfig, layer: int | None) -> bool:
    """Whether a layer's tensors are stored but never run: extra prediction layers behind the last one."""
    return layer is not None and 0 <= layer - config.num_hidden_layers < config.num_nextn_predict_layers


def decode_int4(weight: Int4Weight, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[out, in] of an INT4 matrix."""
    packed = torch.from_numpy(weight.packed)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=2).reshape(packed.shape[0], -1)
    return _scaled(nibbles.to(torch.int8) - 8, weight.scales, dtype)


def decode_int8(weight: Int8Weight, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[out, in] of an int8 matrix."""
    return _scaled(torch.from_numpy(weight.codes), weight.scales, dtype)


def _scaled(codes: torch.Tensor, scales: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """int8 codes [out, in] times a scale per 32 columns, bits of bfloat16 as uint16 [out, in // 32]."""
    steps = torch.from_numpy(scales).view(torch.bfloat16).float()
    groups = codes.reshape(*steps.shape, KERNEL_GROUP).float() * steps[:, :, None]
    return groups.reshape(codes.shape).to(dtype)


def decode_fp8(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """bfloat16 [out, in] of a float8 matrix with one float32 scale per block of rows x columns: fp8 * scale."""
    rows, columns = weight.shape
    full = scales.float().repeat_interleave(block[0], dim=0)[:rows].repeat_interleave(block[1], dim=1)[:, :columns]
    return (weight.float() * full).to(torch.bfloat16)


def locate(headers: list[Header]) -> dict[str, Located]:
    """All tensors by normalised name. Raises CheckpointError if two of them claim one name."""
    tensors: dict[str, Located] = {}
    for header in headers:
        for stored, entry in header.entries.items():
            name = normalise(stored)
            if name in tensors:
                raise damaged(header.path, f"{stored} is also in {tensors[name].shard.name}")
            if name is not None:
                tensors[name] = Located(header.path, entry)
    return tensors


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a model directory; reads configuration and headers only.

    Raises CheckpointError, one line naming the file and the way out, if the directory, a file or a tensor of the text
    model is missing, damaged, of a shape the configuration does not give, or of an unsupported kind.
    """
    directory = model_directory(path)
    raw = read_json(directory / "config.json")
    ModelConfig.from_dict(raw)  # an unsupported model is named before its shards are looked at
    generation = directory / "generation_config.json"
    headers = [read_header(shard) for shard in shard_paths(directory)]
    checkpoint = Checkpoint(directory, raw, read_json(generation) if generation.exists() else {}, headers)
    _check_text_model(checkpoint)
    return checkpoint


def model_directory(path: Path | str) -> Path:
    """`path` as a directory that holds a config.json, or CheckpointError with the command that would get one."""
    directory, name = Path(path).expanduser(), str(path)
    holds = "Name the directory that holds config.json and the shards."
    if directory.is_dir():
        if (directory / "config.json").is_file():
            return directory
        raise CheckpointError(f"{name} has no config.json.", holds)
    if directory.exists():
        raise CheckpointError(f"{name} is a file, not a model directory.", holds)
    is_repo = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    repo = name if is_repo else "moonshotai/Kimi-K2.5"
    raise CheckpointError(
        f"There is no model directory {name} here.", f"Check the path, or fetch a model: kimi-local pull {repo}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}.", REFETCH) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, "it is not JSON") from error
    if not isinstance(content, dict):
        raise damaged(path, "it is not a JSON object")
    return content


def shard_paths(directory: Path) -> list[Path]:
    """The shards the index names, or the single file where there is no index. All exist."""
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).is_file():
            raise CheckpointError(f"{directory} has neither {INDEX} nor {SINGLE}.", REFETCH)
        return [directory / SINGLE]
    paths = [directory / name for name in sorted(set(read_index(index).values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{directory} lacks the shard {missing[0]}{more}.", REFETCH)
    return paths


def read_index(path: Path) -> dict[str, str]:
    """Stored tensor name -> shard file name from model.safetensors.index.json; names with a directory are refused."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "it has no weight_map")
    for shard in set(map(str, weight_map.values())):
        if Path(shard).name != shard:
            raise damaged(path, f"it names a shard outside its directory: {shard!r}")
    return {str(name): str(shard) for name, shard in weight_map.items()}


def _check_text_model(checkpoint: Checkpoint) -> None:
    """Raise for the first tensor of the text model that is missing or could not be used as it is."""
    tensors = checkpoint._tensors
    stored = {name: located.entry.dtype for name, located in tensors.items()}
    for name, spec in expected_tensors(checkpoint.config, stored).items():
        if is_vision(name):
            continue
        entry = checkpoint.entry(name)
        usable = spec.dtypes | FLOATS if spec.dtypes & FLOATS and "weight_scale" not in name else spec.dtypes
        if entry.shape != spec.shape:
            raise damaged(tensors[name].shard, f"{name} has shape {list(entry.shape)}, not {list(spec.shape)}")
        if entry.dtype not in usable:
            raise damaged(tensors[name].shard, f"{name} has dtype {entry.dtype}, not {' or '.join(sorted(usable))}")
