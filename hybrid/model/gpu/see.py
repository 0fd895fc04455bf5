"""What the tokens of a decode step attend to, as tensors on a card; needs no Triton."""

import torch

from hybrid.config import ModelConfig
from hybrid.model.batch import Batch, Seen

FEW = 16  # tokens of one sequence up to which a program per token is taken, and not products of all with all


def supports(config: ModelConfig) -> bool:
    """Whether the kernel takes rows of this shape."""
    return all(width & (width - 1) == 0 and width >= 16 for width in (config.kv_lora_rank, config.qk_rope_head_dim))


def see(batch: Batch, config: ModelConfig, device: torch.device) -> Seen | None:
    """What each token sees, on `device`; None for a batch or a model that our kernel does not take."""
    if not supports(config) or any(segment.stop - segment.start > FEW for segment in batch.segments):
        return None
    width = max(len(segment.page_table) for segment in batch.segments)
    tables = [(*segment.page_table, *[0] * (width - len(segment.page_table))) for segment in batch.segments]
    sequences = [i for i, s in enumerate(batch.segments) for _ in range(s.start, s.stop)]
    lengths = [s.past + i + 1 for s in batch.segments for i in range(s.stop - s.start)]
    a, b, c = (torch.tensor(values, dtype=torch.int32).to(device) for values in (tables, sequences, lengths))
    return Seen(a, b, c, max(lengths))
