"""Weights on disk: opening, checking and writing model directories, as released and as packs of our own."""

from pathlib import Path

from hybrid.checkpoint import hf
from hybrid.checkpoint.hf import Checkpoint, Expert, Int4Weight
from hybrid.checkpoint.manifest import UNFINISHED, is_pack
from hybrid.checkpoint.pack import LayerBlobs, Pack, open_pack
from hybrid.checkpoint.write import CheckpointWriter
from hybrid.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Expert",
    "Int4Weight",
    "LayerBlobs",
    "Pack",
    "is_pack",
    "open_checkpoint",
    "open_pack",
]


def open_checkpoint(path: Path | str, *, verify: bool = False) -> Checkpoint:
    """Open a model directory of either kind; reads configuration and headers only.

    `verify` makes a pack compare its experts with their checksums as well. Raises CheckpointError, one line naming the
    file and the way out, if anything is missing, damaged, or of an unsupported kind.
    """
    if (Path(path).expanduser() / UNFINISHED).is_file():
        raise CheckpointError(f"{path} is an unfinished pack.", "Run the kimi-local quantize that began it once more.")
    directory = hf.model_directory(path)
    return open_pack(directory, verify=verify) if is_pack(directory) else hf.open_checkpoint(directory)
