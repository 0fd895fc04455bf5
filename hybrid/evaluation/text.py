"""How well a model predicts text, in figures that models with other vocabularies can be compared by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybrid.kimi import Kimi
from hybrid.progress import OnProgress, Progress, ignore

HELDOUT = Path(__file__).parent / "data" / "heldout.txt"


@dataclass(frozen=True)
class TextScore:
    """`tokens` predicted, which spell `bytes` bytes, and their surprise -log p in all, in nats."""

    tokens: int
    bytes: int
    nats: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """The figure that does not depend on how the vocabulary cuts text."""
        return self.nats / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        figures = ("tokens", "nats_per_token", "perplexity", "bits_per_byte")
        return {name: getattr(self, name) for name in figures}


def read_text(kimi: Kimi, windows: Sequence[Sequence[int]], report: OnProgress = ignore) -> TextScore:
    """Predict windows of ids, each from its own beginning; of each all but the first token count.

    Raises KimiError for a model that gives values which are not numbers.
    """
    assert all(len(window) > 1 for window in windows), "a single token is not predicted from anything"
    nats = 0.0
    for done, window in enumerate(windows):
        report(Progress("text", done, len(windows), "windows"))
        nats += _surprise(kimi, window)
    predicted = [token for window in windows for token in window[1:]]
    spelled = sum(len(kimi.tokenizer.token_bytes(token, skip_special=False)) for token in predicted)
    return TextScore(len(predicted), spelled, nats)


def _surprise(kimi: Kimi, window: Sequence[int]) -> float:
    logits = kimi.logits(window)[:-1]
    following = torch.tensor(window[1:], device=logits.device)[:, None]
    return -float(logits.log_softmax(-1).gather(1, following).double().sum())
