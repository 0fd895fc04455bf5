"""A synthetic Kimi K2.5 of a few layers at their full size, in the released format.

`python tools/make_layer.py DIR` writes one MoE layer as Moonshot ships it, in a shard of its own: attention and shared
expert in bf16, 384 experts in INT4 with a bf16 scale per 32 weights, 9.8 GB. A small vocabulary and its tables make it
a complete model. `--layers`, `--dense`, `--experts` and `--vocab` change the counts; `--config JSON` any key of the
text configuration, for smaller ones. tools/make_mini.py is this with the sizes of a model to time.

Weights are Gaussian, sigma 0.02; an expert's are then rounded to INT4 as released: largest of 32 / 7, codes -7 to 7.
They are cut from one random stream of 16.8 million, each row at a random place: no two experts agree, and writing is
as fast as the disk. Gigabytes are streamed; a few hundred megabytes of memory are enough.
"""

import argparse
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from make_hollow import IDS, TEXT_CONFIG, place, stored_name, write_shard
from numpy.lib.stride_tricks import sliding_window_view

from hybrid.chat.template import DEFAULT_TEMPLATE
from hybrid.chat.tokenizer import NUM_SPECIALS, write_tokenizer
from hybrid.checkpoint.expected import Spec, expected_tensors
from hybrid.checkpoint.header import ITEMSIZE, Entry, read_header
from hybrid.checkpoint.names import normalise
from hybrid.checkpoint.tiny import IM_END, quantize_int4, tiny_config
from hybrid.checkpoint.write import INDEX, pack_int4, shard_name
from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError, DoesNotFit, KimiError, UsageError

SIGMA = 0.02
GROUP = 32  # weights per INT4 scale
GROUPS = 1 << 19  # in the random stream
PIECE = 1 << 24  # values made and written at once


class Stream(NamedTuple):
    """Random weights, made once, from which every matrix is cut; `seed` and the matrix's name decide where."""

    seed: int
    values: np.ndarray  # fp32 [32 * GROUPS], of unit variance
    codes: np.ndarray  # uint8 [16 * GROUPS]: the same times SIGMA as released INT4
    scales: np.ndarray  # uint16 [GROUPS]: bits of bf16

    @classmethod
    def make(cls, seed: int) -> "Stream":
        values = np.random.default_rng(seed).standard_normal(GROUP * GROUPS, np.float32)
        codes, scales = quantize_int4(values[None] * np.float32(SIGMA), GROUP)
        return cls(seed, values, pack_int4(codes).view(np.uint8)[0], bf16_bits(scales)[0])

    def starts(self, matrix: str, rows: int, columns: int) -> np.ndarray:
        """The group at which each row of a matrix begins: the same for all its tensors, others for other matrices."""
        rng = np.random.default_rng((self.seed, zlib.crc32(matrix.encode())))
        return rng.integers(0, GROUPS - -(-columns // GROUP), rows)

    def tensor(self, name: str, entry: Entry, specs: Mapping[str, Spec]) -> Iterator[np.ndarray]:
        """The bytes of a tensor (normalised name), a piece of its rows at a time."""
        matrix, _, part = name.rpartition(".")
        if part == "weight_shape":
            rows, words = specs[f"{matrix}.weight_packed"].shape
            yield np.array([rows, 8 * words], "<i4")
            return
        rows, width = (1, *entry.shape)[-2:]
        columns = width * {"weight_packed": 8, "weight_scale": GROUP}.get(part, 1)
        starts = self.starts(matrix, rows, columns)
        for some in np.array_split(starts, -(-rows * columns // PIECE)):
            yield self._rows(name, entry.dtype, some, columns)

    def _rows(self, name: str, dtype: str, starts: np.ndarray, columns: int) -> np.ndarray:
        if name.endswith(".weight_packed"):
            return cut(self.codes, starts * (GROUP // 2), columns // 2)
        if name.endswith(".weight_scale"):
            return cut(self.scales, starts, columns // GROUP)
        mean, spread = moments(name)
        rows = cut(self.values, starts * GROUP, columns) * np.float32(spread) + np.float32(mean)
        return rows if dtype == "F32" else bf16_bits(torch.from_numpy(rows).bfloat16())


def cut(source: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    """[n], starts [rows] -> [rows, width]: a run of `source` from each start."""
    return sliding_window_view(source, width)[starts]


def bf16_bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def moments(name: str) -> tuple[float, float]:
    """Mean and spread of an unquantised tensor's values by its part in the model."""
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith("bias"):
        return 0.0, 0.1
    return 0.0, 1.0 if name == "embed_tokens.weight" else SIGMA


# --- the directory -------------------------------------------------------------------------------------------------


def synthetic_config(layers: int, dense: int, experts: int, vocab: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of Kimi K2.5 without images, of `dense` plain and `layers` MoE layers."""
    shape = {key: value for key, value in TEXT_CONFIG.items() if key not in IDS}
    shape |= {"num_hidden_layers": dense + layers, "first_k_dense_replace": dense}
    shape |= {"n_routed_experts": experts, "vocab_size": vocab}
    return tiny_config({**shape, **overrides}, experts="int4", nested=True)


def make_synthetic(directory: Path, raw: dict[str, Any], seed: int) -> Path:
    """Write a random model with this config.json to `directory`, which must not exist.

    It appears there when it is complete. Raises CheckpointError for a configuration that is not supported or a
    directory that exists, DoesNotFit before anything is written when the disk is too small.
    """
    config = ModelConfig.from_dict(raw)
    vocabulary = ranks(config.vocab_size - NUM_SPECIALS)
    specs = expected_tensors(config)
    if directory.exists():
        raise CheckpointError(f"{directory} already exists.", "Choose another directory or remove this one.")
    require_disk(directory, specs)
    staging = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write_shards(staging, specs, config.num_hidden_layers, Stream.make(seed))
    write_tokenizer(staging, vocabulary)
    for name, text in text_files(raw, config).items():
        (staging / name).write_text(text)
    os.rename(staging, directory)
    return directory


def ranks(count: int) -> list[bytes]:
    """`count` tokens: the single bytes, then pairs of them. Raises UsageError beyond 65,792."""
    pairs = map(bytes, product(range(256), repeat=2))
    tokens = [*(bytes([byte]) for byte in range(256)), *pairs]
    if not 256 <= count <= len(tokens):
        raise UsageError(f"The vocabulary is 512 to {len(tokens) + NUM_SPECIALS:,} tokens.", "Choose another --vocab.")
    return tokens[:count]


def require_disk(directory: Path, specs: Mapping[str, Spec]) -> None:
    needed = sum(math.prod(shape) * ITEMSIZE[min(dtypes)] for shape, dtypes in specs.values()) / 1e9
    parent = next(path for path in directory.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free / 1e9
    if needed > free:
        raise DoesNotFit(f"This needs {needed:.1f} GB of disk; {free:.1f} GB are free.", "Use fewer --experts.")


def write_shards(directory: Path, specs: Mapping[str, Spec], layers: int, stream: Stream) -> None:
    """One shard per layer, one for the tables, and the index."""
    total = layers + 1
    weight_map: dict[str, str] = {}
    size = 0
    for number in range(1, total + 1):
        held = {stored_name(name): spec for name, spec in specs.items() if place(name, layers) == number}
        path = directory / shard_name(number, total)
        size += write_shard(path, held)
        fill(path, specs, stream)
        weight_map |= dict.fromkeys(held, path.name)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))


def fill(path: Path, specs: Mapping[str, Spec], stream: Stream) -> None:
    """Give a hollow shard its data."""
    entries = read_header(path).entries
    with path.open("r+b") as file:
        for stored, entry in entries.items():
            name = normalise(stored)
            assert name is not None, stored
            file.seek(entry.start)
            for rows in stream.tensor(name, entry, specs):
                file.write(np.ascontiguousarray(rows).data)
            assert file.tell() == entry.end, stored


def text_files(raw: dict[str, Any], config: ModelConfig) -> dict[str, str]:
    im_end = config.vocab_size - NUM_SPECIALS + IM_END
    generation = {"max_length": config.max_position_embeddings, "eos_token_id": im_end}
    return {
        "config.json": json.dumps(raw, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "chat_template.jinja": DEFAULT_TEMPLATE,
    }


# --- the command ---------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None, defaults: Mapping[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=1, help="with experts")
    parser.add_argument("--dense", type=int, default=0, help="layers without, before them")
    parser.add_argument("--experts", type=int, default=384, help="per layer")
    parser.add_argument("--vocab", type=int, default=20480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=json.loads, default={}, help="JSON object of text_config keys to override")
    parser.description = defaults.get("description", __doc__)
    parser.set_defaults(**{key: value for key, value in defaults.items() if key != "description"})
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, **defaults: Any) -> int:
    """`defaults` replaces the options' own and the `description`."""
    options = parse(arguments, defaults)
    counts = options.layers, options.dense, options.experts, options.vocab
    try:
        path = make_synthetic(options.directory, synthetic_config(*counts, options.config), options.seed)
    except KimiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    sizes = [shard.stat().st_size for shard in path.glob("*.safetensors")]
    print(f"{sum(sizes):,} bytes in {len(sizes)} shards: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
