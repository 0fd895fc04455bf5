"""Reading a pack: a model directory whose routed experts stand ready for the kernels (see `manifest` for its files).

Opening checks all that headers and the manifest can tell. A resident tensor is compared with its checksum when it is
first asked for; experts are compared when their layer is first asked for, if the pack was opened with `verify`.
"""

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hybrid.checkpoint.blob import Formats, Shapes, decode_blob
from hybrid.checkpoint.header import damaged
from hybrid.checkpoint.hf import Checkpoint, Expert, Located, map_file, read_json
from hybrid.checkpoint.manifest import LayerRecord
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
        self._verify = verify
        self._unread = _tensor_checksums(scan)
        self._sound_layers: set[int] = set()

    def experts(self, layer: int) -> LayerBlobs:
        """All routed experts of a layer. Raises CheckpointError for a damaged one if the pack is verified."""
        record = self.manifest.layers[layer]
        data = self._map(self.path / record.file)
        if self._verify and layer not in self._sound_layers:
            _require_checksums(self.path / record.file, layer, record, data)
            self._sound_layers.add(layer)
        return LayerBlobs(data, record.offsets, record.formats)

    def expert(self, layer: int, i: int, dtype: torch.dtype = torch.bfloat16) -> Expert:
        """Routed expert `i` of `layer`, decoded; float32 keeps what the kernels see."""
        blobs = self.experts(layer)
        size = self.shapes.blob_bytes(blobs.formats[i])
        blob = blobs.data[blobs.offsets[i] : blobs.offsets[i] + size]
        return Expert(*decode_blob(blob, blobs.formats[i], self.shapes, self.manifest.seed, layer, dtype))

    def expert_format(self, layer: int) -> str:
        """ "pack": `experts` gives this layer as the kernels read it."""
        return "pack"

    def load_bytes(self, dtype_size: int = 2, packed: bool = True) -> dict[str, int]:
        """As for any checkpoint; "routed_experts" are the blobs."""
        return super().load_bytes(dtype_size, packed) | {"routed_experts": self.manifest.expert_bytes}

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


def _require_checksums(path: Path, layer: int, record: LayerRecord, data: np.ndarray) -> None:
    ends = [*record.offsets.tolist()[1:], record.size]
    spans = list(zip(record.offsets.tolist(), ends, strict=True))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found: Iterable[int] = pool.map(lambda span: zlib.crc32(data[span[0] : span[1]].data), spans)
        for i, (crc, recorded) in enumerate(zip(found, record.crc32, strict=True)):
            if crc != recorded:
                raise damaged(path, f"layer {layer} expert {i} does not have the checksum in its manifest")
