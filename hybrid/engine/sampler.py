"""From logits to a token: penalties, temperature, top-k, top-p, min-p, with a generator of its own per request."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.errors import KimiError, UsageError

# Thinking and instant, for K2.5.
RECOMMENDED = {True: {"temperature": 1.0, "top_p": 0.95}, False: {"temperature": 0.6, "top_p": 0.95}}
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
    stop: tuple[str, ...] = ()  # texts of the answer, not of reasoning, before which it ends
    presence_penalty: float = 0.0  # taken once from the logit of every id of the answer so far,
    frequency_penalty: float = 0.0  # and this as often as it is there
    repetition_penalty: float = 1.0  # divides positive logits of ids of prompt and answer, and multiplies negative ones
    logit_bias: tuple[tuple[int, float], ...] = ()  # added to the logits of these ids
    logprobs: int | None = None  # how many likeliest ids to tell of for every token; None: nothing is told

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (no limit) or more"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "stop": (all(self.stop), "without empty texts"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "between -2 and 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "logit_bias": (all(math.isfinite(bias) for _, bias in self.logit_bias), "of finite numbers"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "0 or more"),
        }
        for name, (valid, meaning) in checks.items():
            if not valid:
                raise UsageError(f"{name} is {getattr(self, name)}.", f"It must be {meaning}.")


def recommended(thinking: bool, generation: Mapping[str, Any], stop_ids: frozenset[int]) -> SamplingParams:
    """As the checkpoint's generation_config says, else as Moonshot recommends for the mode."""
    values: dict[str, Any] = dict(RECOMMENDED[thinking])
    known = ("temperature", "top_p", "top_k", "min_p")
    values |= {key: generation[key] for key in known if generation.get(key) is not None}
    if generation.get("do_sample") is False:
        values["temperature"] = 0.0
    return SamplingParams(**values, stop_ids=stop_ids)


def require_finite(logits: Tensor) -> None:
    """Raise KimiError for NaN or infinity, which would pass for token 0, "!", for ever."""
    if not bool(torch.isfinite(logits).all()):
        raise KimiError(
            "The model produced values that are not numbers.",
            "Its weights are probably damaged: run `kimi-local doctor MODEL --deep`.",
        )


class Sampler:
    """Draws tokens for one request; the same seed and logits give the same tokens, whatever else is running."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        """`prompt`: the ids before the answer, for the repetition penalty."""
        self.params = params
        self.generator = torch.Generator()
        self._prompt = frozenset(prompt) if params.repetition_penalty != 1 else frozenset()
        self._made: Counter[int] = Counter()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def sample(self, logits: Tensor, allowed: Tensor | None = None) -> int:
        """logits fp32 [vocab] -> one token id, of those `allowed` (bool [vocab]) if that is given.

        Raises KimiError when the model has produced NaN or infinity, or when nothing is allowed.
        """
        require_finite(logits)
        logits = self._adjusted(logits)
        if allowed is not None:
            if not bool(allowed.any()):
                raise KimiError("No token is allowed to come next.", "Ask for another form of the answer.")
            logits = logits.masked_fill(~allowed.to(logits.device), -math.inf)
        if self.params.temperature == 0:
            return int(logits.argmax())
        probabilities, ids = self._candidates((logits.cpu() / self.params.temperature).softmax(dim=-1))
        return int(ids[self._draw(probabilities)])

    def note(self, token: int) -> None:
        """`token` is part of the answer from now on."""
        self._made[token] += 1

    def _adjusted(self, logits: Tensor) -> Tensor:
        """`logits` after penalties and biases."""
        params = self.params
        seen = list(self._prompt | self._made.keys()) if params.repetition_penalty != 1 else []
        made = list(self._made) if params.presence_penalty or params.frequency_penalty else []
        if not (seen or made or params.logit_bias):
            return logits
        logits = logits.cpu().clone()
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        times = torch.tensor([self._made[token] for token in made], dtype=torch.float32)
        logits[made] -= params.presence_penalty + params.frequency_penalty * times
        for token, bias in params.logit_bias:
            logits[token] += bias
        return logits

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
        kept[0] = True  # also under a top_p that is nothing in fp32
        return values[kept], ids[kept]
