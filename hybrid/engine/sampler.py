"""From logits to a token: temperature, top-k, top-p, min-p, with a generator of its own per request."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.errors import KimiError, UsageError

LIKELY = 1024  # candidates looked at before a full sort: enough for nearly every step


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest
    seed: int | None = None
    max_tokens: int = 32768
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (no limit) or more"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
        }
        for name, (valid, meaning) in checks.items():
            if not valid:
                raise UsageError(f"{name} is {getattr(self, name)}.", f"It must be {meaning}.")


def require_finite(logits: Tensor) -> None:
    """Raise KimiError for NaN or infinity, which would pass for token 0, "!", for ever."""
    if not bool(torch.isfinite(logits).all()):
        raise KimiError(
            "The model produced values that are not numbers.",
            "Its weights are probably damaged: run `kimi-local doctor MODEL --deep`.",
        )


class Sampler:
    """Draws tokens for one request; the same seed and logits give the same tokens, whatever else is running."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def sample(self, logits: Tensor) -> int:
        """logits fp32 [vocab] -> one token id. Raises KimiError when the model has produced NaN or infinity."""
        require_finite(logits)
        if self.params.temperature == 0:
            return int(logits.argmax())
        probabilities, ids = self._candidates((logits.cpu() / self.params.temperature).softmax(dim=-1))
        return int(ids[self._draw(probabilities)])

    def _draw(self, probabilities: Tensor) -> int:
        """An index of `probabilities` [candidates], which need not sum to 1.

        One number per token, however many candidates there are: logits that differ in the last bits, because other
        requests were computed beside, leave the generator where it would be, and nearly always the token too.
        """
        shares = probabilities.double().cumsum(0)
        point = torch.rand(1, dtype=torch.float64, generator=self.generator) * shares[-1]
        return int(torch.searchsorted(shares, point, right=True))  # the first whose share reaches beyond the point

    def _candidates(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that survive top-k, top-p and min-p, likeliest first, with their probabilities."""
        count = min(self.params.top_k or LIKELY, len(probabilities))
        values, ids = probabilities.topk(count)
        if not self.params.top_k and float(values.sum()) < self.params.top_p:
            values, ids = probabilities.sort(descending=True)
        before = values.cumsum(0) - values  # mass of likelier tokens: the one that crosses top_p still counts
        kept = (before < self.params.top_p) & (values >= self.params.min_p * values[0])
        return values[kept], ids[kept]
