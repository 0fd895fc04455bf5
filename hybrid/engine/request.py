"""One request on its way through the engine."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from hybrid.engine.sampler import Sampler, SamplingParams
from hybrid.errors import ContextExceeded, KimiError, UsageError

Mask = Callable[[Sequence[int]], Tensor | None]  # ids made so far -> bool [vocab] of those that may come next


class Cancelled(Exception):
    """Raised between layers to abandon a step whose requests were all cancelled; the cache stays as it was."""


class Closed(KimiError):
    """Nothing is computed any more: the model was closed, or an error has ended the engine."""


class TokenLogprobs(NamedTuple):
    """An id of an answer with its log-probability, and the likeliest ids with theirs, likeliest first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def require_room(tokens: int, ctx: int) -> None:
    """Raise ContextExceeded when a prompt of `tokens` tokens does not fit."""
    if tokens > ctx:
        raise ContextExceeded(
            f"The prompt needs {tokens:,} tokens of context and there are {ctx:,}.",
            "Use a larger --ctx, or a shorter prompt.",
        )


def token_logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of the distribution that logits fp32 [vocab] give: `token`'s, and those of the `count` likeliest ids."""
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprobs(token, float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))


def no_progress(done: int, total: int) -> None:
    """The default `on_prefill`."""


def no_notice(token: int) -> None:
    """The default `on_token`."""


@dataclass
class Request:
    """What to continue, how, and the two things that may change while it runs: `cancelled` and `forced`.

    Both may be set from another thread or a signal handler; they take effect at the next layer or token. `on_prefill`,
    `on_token` and `mask` are called on the thread that computes: before the next token is, so that `on_token` may
    force it, or end the answer by setting `finish_reason`.
    """

    prompt: list[int]
    params: SamplingParams
    on_prefill: Callable[[int, int], None] = no_progress  # prompt tokens done (cached ones included), and in all
    on_token: Callable[[int], None] = no_notice  # every id of the answer, a stop id included
    mask: Mask | None = None
    keep: bool = True  # whether its rows may stay on disk
    cancelled: bool = False
    forced: deque[int] = field(default_factory=deque)  # tokens to emit next instead of sampling

    # filled by the engine
    cached_tokens: int = 0
    disk_tokens: int = 0  # of those, read from the disk
    prefill_seconds: float = 0.0
    drafted: int = 0  # ids guessed and computed ahead,
    accepted: int = 0  # and those that were right
    finish_reason: str = ""  # stop | length | context | interrupted
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the model itself: before penalties, temperature

    def require_room(self, ctx: int) -> None:
        """Raise ContextExceeded when the prompt leaves no room for an answer in `ctx` tokens."""
        assert self.prompt, "an empty prompt has nothing to continue"
        require_room(len(self.prompt) + 1, ctx)

    def require_known(self, vocab: int) -> None:
        """Raise UsageError for an id that is none of `vocab`."""
        for name, ids in (("The prompt", self.prompt), ("logit_bias", [i for i, _ in self.params.logit_bias])):
            if ids and not 0 <= min(ids) <= max(ids) < vocab:
                raise UsageError(f"{name} has a token that the model does not.", f"It has 0 to {vocab - 1:,}.")

    def choose(self, sampler: Sampler, logits: Tensor, answer: Sequence[int]) -> int:
        """The next id after `answer`: what is forced, else what is drawn by logits fp32 [vocab]."""
        if self.forced:
            token = self.forced.popleft()
        else:
            token = sampler.sample(logits, None if self.mask is None else self.mask(answer))
        sampler.note(token)
        if self.params.logprobs is not None:
            self.logprobs.append(token_logprobs(logits, token, self.params.logprobs))
        return token

    def note_end(self, token: int, count: int, *, full: bool) -> None:
        """Set `finish_reason` if `token`, the `count`th of the answer, is its last; `full`: no row is left for it."""
        self.on_token(token)
        if self.finish_reason:
            return
        if token in self.params.stop_ids:
            self.finish_reason = "stop"
        elif self.cancelled:
            self.finish_reason = "interrupted"
        elif count == self.params.max_tokens:
            self.finish_reason = "length"
        elif full:
            self.finish_reason = "context"
