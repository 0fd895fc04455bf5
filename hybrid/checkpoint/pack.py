"""Reading a pack: a model directory whose routed experts stand ready for the kernels (see `manifest` for its files).

Opening checks all that headers and the manifest can tell. A resident tensor is compared with its checksum when it is
first asked for; experts are compared when their layer is first asked for, if the pack was opened with `verify`. Who
reads the experts' files without mapping them compares with `require_checksum`.
"""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hybrid.checkpoint.blob import Formats, Shapes, decode_blob
from hybrid.checkpoint.header import damaged
from hybrid.checkpoint.hf import Checkpoint, Expert, Located, map_file, read_json
from hybrid.checkpoint.pack_check import PackScan, require_sound, scan_pack


class LayerBlobs(NamedTuple):
    """The routed experts of one layer. Expert i begins at `data[offsets[i]]`, on a page (`blob` says what follows)."""

    data: np.ndarray  # uint8, the whole file, mapped
    offsets: np.ndarray  # int64 [experts]
    formats: list[Formats]  # of gate_up and down, per expert


class Pack(Checkpoint):
    """A checkpoint whose routed experts are blobs; everything else is read as in any other."""

    def __init__(self, scan: PackScan, verify: bool) -> None:
        """Use `open_pack`."""
        generation = scan.path / "generation_config.json"
        raw, defaults = read_json(scan.path / "config.json"), read_json(generation) if generation.exists() else {}
        super().__init__(scan.path, raw, defaults, scan.headers)
        self.manifest = scan.manifest
        self.shapes = Shapes.of(self.config)
        self.verify = verify
        self._unread = _tensor_checksums(scan)
        self._sound_layers: set[int] = set()

    def experts(self, layer: int) -> LayerBlobs:
        """All routed experts of a layer. Raises CheckpointError for a damaged one if the pack is verified."""
        record = self.manifest.layers[layer]
        data = self._map(self.path / record.file)
        blobs = LayerBlobs(data, record.offsets, record.formats)
        if self.verify and layer not in self._sound_layers:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                experts = range(len(record.formats))
                list(pool.map(lambda i: self.require_checksum(layer, i, [self._blob(blobs, i)]), experts))
            self._sound_layers.add(layer)
        return blobs

    def require_checksum(self, layer: int, i: int, parts: Sequence[np.ndarray]) -> None:
        """Raise CheckpointError unless `parts`, uint8, in a row are expert `i`; its padding may be absent."""
        record, crc = self.manifest.layers[layer], 0
        for part in parts:
            crc = zlib.crc32(part.data, crc)
        absent = self.shapes.blob_bytes(record.formats[i]) - sum(part.size for part in parts)
        if zlib.crc32(bytes(absent), crc) != record.crc32[i]:
            what = f"layer {layer} expert {i} does not have the checksum in its manifest"
            raise damaged(self.path / record.file, what)

    def expert(self, layer: int, i: int, dtype: torch.dtype = torch.bfloat16) -> Expert:
        """Routed expert `i` of `layer`, decoded; float32 keeps what the kernels see."""
        blobs = self.experts(layer)
        blob = self._blob(blobs, i)
        return Expert(*decode_blob(blob, blobs.formats[i], self.shapes, self.manifest.seed, layer, dtype))

    def expert_format(self, layer: int) -> str:
        """ "pack": `experts` gives this layer as the kernels read it."""
        return "pack"

    def load_bytes(self, dtype_size: int = 2, packed: bool = True) -> dict[str, int]:
        """As for any checkpoint; "routed_experts" are the blobs."""
        return super().load_bytes(dtype_size, packed) | {"routed_experts": self.manifest.expert_bytes}

    def _blob(self, blobs: LayerBlobs, i: int) -> np.ndarray:
        return blobs.data[blobs.offsets[i] :][: self.shapes.blob_bytes(blobs.formats[i])]

    def _map(self, path: Path) -> np.ndarray:
        if path not in self._maps:
            self._maps[path] = map_file(path)
        return self._maps[path]

    def _bytes(self, located: Located) -> np.ndarray:
        data = super()._bytes(located)
        expected = self._unread.get((located.shard, located.entry.start))
        if expected is not None:
            name, crc = expected
            if zlib.crc32(data.data) != crc:
                raise damaged(located.shard, f"{name} does not have the checksum in its manifest")
            self._unread.pop((located.shard, located.entry.start), None)
        return data


def open_pack(path: Path | str, *, verify: bool = False) -> Pack:
    """Open a pack; `verify` compares experts with their checksums too, which reads them all once.

    Raises CheckpointError, naming the file, if a file or tensor is missing, of the wrong size or shape, or damaged as
    far as headers and small files show.
    """
    scan = scan_pack(path)
    require_sound(scan)
    return Pack(scan, verify)


def _tensor_checksums(scan: PackScan) -> dict[tuple[Path, int], tuple[str, int]]:
    """(file, first byte) -> (name, crc32) of every resident tensor."""
    crcs = {record.file: record.crc32 for record in scan.manifest.residents}
    entries = ((header.path, name, entry) for header in scan.headers for name, entry in header.entries.items())
    return {(path, entry.start): (name, crcs[path.name][name]) for path, name, entry in entries}
