"""Decode attention over pages, against all scores spelled out in double precision."""

import dataclasses

import pytest
import torch

from hybrid.memory.known import known
from hybrid.memory.kv_format import REDUCED
from hybrid.model.batch import Batch, Segment
from hybrid.model.gpu import Card, check
from hybrid.model.gpu.see import FEW, see


@pytest.mark.parametrize(
    ("lengths", "heads", "rank", "rope"),
    [([1], 16, 32, 16), ([64, 65, 130], 4, 16, 16), ([700, 3], 20, 64, 32), ([70], 3, 512, 64)],
)
@pytest.mark.parametrize("kind", ["values", *REDUCED])
def test_decode(card: Card, lengths: list[int], heads: int, rank: int, rope: int, kind: str) -> None:
    assert check.attention_error(card, lengths, heads, rank, rope, torch.float32, kind) < check.CLOSE
    assert check.attention_error(card, lengths, heads, rank, rope, torch.bfloat16, kind) < 1e-2  # the result is bf16


def test_what_each_token_sees() -> None:
    config, cpu = known("k2.5").config, torch.device("cpu")
    segments = Segment(0, 2, 64, (7, 3)), Segment(2, 3, 0, (5,))
    seen = see(Batch(torch.zeros(3, dtype=torch.int64), segments), config, cpu)
    assert seen is not None
    assert seen.tables.tolist() == [[7, 3], [5, 0]]
    assert seen.sequences.tolist() == [0, 0, 1] and seen.lengths.tolist() == [65, 66, 1] and seen.longest == 66
    long = Batch(torch.zeros(FEW + 1, dtype=torch.int64), (Segment(0, FEW + 1, 0, (0,)),))
    assert see(long, config, cpu) is None
    assert see(Batch(torch.zeros(3), segments), dataclasses.replace(config, kv_lora_rank=384), cpu) is None
