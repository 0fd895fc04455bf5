"""All experts of one layer, encoded side by side and written each at its place."""

import os
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager

import numpy as np

from hybrid.checkpoint import Checkpoint, Expert, Int4Weight
from hybrid.checkpoint.blob import Formats, Shapes, place
from hybrid.checkpoint.header import damaged
from hybrid.checkpoint.hf import Weight
from hybrid.checkpoint.manifest import LayerRecord, experts_file
from hybrid.convert.encode import LayerEncoder, encode_expert
from hybrid.convert.journal import Entry, Journal, read_journal
from hybrid.convert.staging import Staging

SYNC_SECONDS = 20.0  # at most so much work is lost to a power cut; a killed process loses none that was journaled
WORKING_MEMORY = 10 << 30  # bytes that all workers together may use
COPIES = 6  # fp32 copies of the larger matrix that one worker holds at a time; 4.3 measured
FEEDBACK_COPIES = 8  # and of the second moments of down's inputs, with a calibration
FRESH_MAPPING = 16  # experts after which the source is mapped anew: pages of a mapping count as this process's memory

OnExpert = Callable[[int], None]  # told the bytes just written


def worker_count(shapes: Shapes, threads: int, *, calibrated: bool) -> int:
    """As many of `threads` as memory allows; one at least."""
    (rows, columns), (_, inner) = shapes
    each = 4 * (COPIES * rows * columns + (FEEDBACK_COPIES * inner * inner if calibrated else 0))
    return max(1, min(threads, WORKING_MEMORY // each))


class LayerFile:
    """The file of one layer in the making, with its journal."""

    def __init__(self, staging: Staging, layer: int, shapes: Shapes, formats: list[Formats]) -> None:
        """Open it; what an earlier run finished is kept where its checksum is right."""
        self.layer, self.formats = layer, formats
        self.name = experts_file(layer)
        self.offsets, self.size = place(shapes, formats)
        self._spans = [*self.offsets.tolist(), self.size]
        self._file = os.open(staging.partial(self.name), os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, self.size)
        journal = staging.journal(self.name)
        noted = read_journal(journal)
        self.journal = Journal(journal, {i: entry for i, entry in noted.items() if self._crc32(i) == entry.crc32})
        self._synced = time.monotonic()

    def _crc32(self, i: int) -> int | None:
        if not 0 <= i < len(self.formats):
            return None
        return zlib.crc32(os.pread(self._file, self._spans[i + 1] - self._spans[i], self._spans[i]))

    @property
    def missing(self) -> list[int]:
        return [i for i in range(len(self.formats)) if i not in self.journal.entries]

    def bytes_of(self, i: int) -> int:
        return int(self._spans[i + 1] - self._spans[i])

    def write(self, i: int, blob: np.ndarray) -> None:
        """Put an expert in its place."""
        data, at = blob.data, self._spans[i]
        while data:
            count = os.pwrite(self._file, data, at)
            data, at = data[count:], at + count

    def sync(self, *, now: bool) -> None:
        """Flush to the disk what was written, if that is due."""
        if now or time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file)
            self.journal.sync()
            self._synced = time.monotonic()

    def record(self) -> LayerRecord:
        """What the manifest will say of it."""
        entries = [self.journal.entries[i] for i in range(len(self.formats))]
        return LayerRecord(
            file=self.name,
            size=self.size,
            offsets=self.offsets,
            formats=self.formats,
            crc32=[entry.crc32 for entry in entries],
            errors=np.array([entry.errors for entry in entries]),
            plain_errors=np.array([entry.plain_errors for entry in entries]),
        )

    def close(self) -> None:
        self.journal.close()
        os.close(self._file)


@contextmanager
def layer_file(staging: Staging, layer: int, shapes: Shapes, formats: list[Formats]) -> Iterator[LayerFile]:
    file = LayerFile(staging, layer, shapes, formats)
    try:
        yield file
    finally:
        file.close()


def write_experts(
    file: LayerFile, encoder: LayerEncoder, checkpoint: Checkpoint, pool: Executor, workers: int, on_expert: OnExpert
) -> None:
    """Encode and write the experts that are missing from `file`, then flush it.

    Raises CheckpointError for an expert whose weights are not numbers.
    """

    def work(i: int, expert: Expert) -> int:
        if not all(map(_is_finite, expert)):
            raise damaged(checkpoint.path, f"layer {file.layer} expert {i} holds NaN or infinity")
        encoded = encode_expert(encoder, i, expert, file.formats[i])
        file.write(i, encoded.blob)
        file.journal.add(Entry(i, zlib.crc32(encoded.blob.data), encoded.errors, encoded.plain_errors))
        return i

    running: set[Future[int]] = set()
    try:
        for number, i in enumerate(file.missing):
            if number % FRESH_MAPPING == 0:
                checkpoint.close()
            running.add(pool.submit(work, i, checkpoint.expert(file.layer, i)))
            if len(running) >= workers:
                running = _collect(running, file, on_expert)
        while running:
            running = _collect(running, file, on_expert)
    finally:
        wait(running)  # after an interrupt: what is being encoded is finished and kept
        file.sync(now=True)


def _is_finite(weight: Weight) -> bool:
    if isinstance(weight, Int4Weight):
        return not ((weight.scales & 0x7F80) == 0x7F80).any()
    return bool(weight.isfinite().all())


def _collect(running: set[Future[int]], file: LayerFile, on_expert: OnExpert) -> set[Future[int]]:
    done, rest = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        on_expert(file.bytes_of(future.result()))
    file.sync(now=False)
    return rest
