"""A training task without files: repeat what was said. As a program, a run of it: `python pocket_copy.py RUN`."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid.checkpoint.tiny import TINY_TEXT_CONFIG

START, AGAIN, STOP = 0, 1, 2
# Small in every dimension, and no two of them alike.
TINY = {
    **TINY_TEXT_CONFIG,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}


class Batch(NamedTuple):
    ids: Tensor
    positions: Tensor
    documents: Tensor
    weights: Tensor


class Copy:
    """Documents START x1 .. xn AGAIN x1 .. xn STOP with `symbols` different x; the second half is to be predicted."""

    def __init__(self, symbols: int = 16, longest: int = 8) -> None:
        self.symbols, self.longest = symbols, longest

    def batch(self, step: int, rows: int, length: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        shape = (rows, length)
        batch = Batch(
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.int64),
            torch.full(shape, -1, dtype=torch.int32),
            torch.zeros(shape),
        )
        for row in range(rows):
            self._fill(batch, row, generator)
        return batch

    def _fill(self, batch: Batch, row: int, generator: torch.Generator) -> None:
        start = document = 0
        while True:
            n = int(torch.randint(1, self.longest + 1, (1,), generator=generator))
            end = start + 2 * n + 3
            if end > batch.ids.shape[1]:
                return
            word = torch.randint(3, 3 + self.symbols, (n,), generator=generator).tolist()
            batch.ids[row, start:end] = torch.tensor([START, *word, AGAIN, *word, STOP])
            batch.positions[row, start:end] = torch.arange(end - start)
            batch.documents[row, start:end] = document
            batch.weights[row, start + n + 2 : end] = 1
            start, document = end, document + 1


def settings(steps: int, **changes: Any) -> Any:
    """Settings of a tiny run, quantized from its half on."""
    from pocket.state import Settings

    half = steps // 2
    known = {"decay_from": half, "qat_from": half, "freeze_from": half, "rows": 4, "length": 64, "shard_rows": 2}
    return Settings(**{"steps": steps, "warmup": 2, "model": TINY, **known, **changes})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    from pocket.train import train

    train(Path(sys.argv[1]), Copy(), log_every=1, save_seconds=0)
