"""How often each expert was chosen: cheap to record, the basis of every decision about where experts live."""

import numpy as np

from hybrid.config import ModelConfig


class RouterStats:
    """Counts by layer and expert since the model was loaded."""

    def __init__(self, config: ModelConfig) -> None:
        self.layers = config.moe_layers
        self.counts = np.zeros((config.num_hidden_layers, config.n_routed_experts), np.int64)
        self.expert_bytes = 0  # bytes of routed experts read so far; an expert counts once per step and layer

    def record(self, layer: int, topk_ids: np.ndarray, expert_bytes: np.ndarray) -> None:
        """topk_ids int [tokens, k] of one step; `expert_bytes` int64 [experts], the sizes of this layer's experts."""
        chosen = np.bincount(topk_ids.reshape(-1), minlength=self.counts.shape[1])
        self.counts[layer] += chosen
        self.expert_bytes += int(expert_bytes[chosen > 0].sum())

    def reset(self) -> None:
        """Start counting afresh."""
        self.counts[:] = 0
        self.expert_bytes = 0
