"""Weights on disk: opening, checking and writing model directories in the released format."""

from hybrid.checkpoint.hf import Checkpoint, Expert, Int4Weight, open_checkpoint
from hybrid.checkpoint.write import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "Expert", "Int4Weight", "open_checkpoint"]
