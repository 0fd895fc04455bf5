"""One request on its way through the engine."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from hybrid.engine.sampler import Sampler, SamplingParams
from hybrid.errors import ContextExceeded


class Cancelled(Exception):
    """Raised between layers to abandon a step whose request was cancelled; the cache stays as it was before it."""


def require_room(tokens: int, ctx: int) -> None:
    """Raise ContextExceeded when a prompt of `tokens` tokens does not fit."""
    if tokens > ctx:
        raise ContextExceeded(
            f"The prompt needs {tokens:,} tokens of context and there are {ctx:,}.",
            "Use a larger --ctx, or a shorter prompt.",
        )


def no_progress(done: int, total: int) -> None:
    """The default `on_prefill`."""


@dataclass
class Request:
    """What to continue, how, and the two things that may change while it runs: `cancelled` and `forced`.

    Both may be set from another thread or a signal handler; they take effect at the next layer or token.
    """

    prompt: list[int]
    params: SamplingParams
    on_prefill: Callable[[int, int], None] = no_progress  # prompt tokens done (cached ones included), and in all
    cancelled: bool = False
    forced: deque[int] = field(default_factory=deque)  # tokens to emit next instead of sampling

    # filled by the engine
    cached_tokens: int = 0
    prefill_seconds: float = 0.0
    finish_reason: str = ""  # stop | length | context | interrupted

    def require_room(self, ctx: int) -> None:
        """Raise ContextExceeded when the prompt leaves no room for an answer in `ctx` tokens."""
        assert self.prompt, "an empty prompt has nothing to continue"
        require_room(len(self.prompt) + 1, ctx)

    def choose(self, sampler: Sampler, logits: Tensor) -> int:
        """The next id: what is forced, else what is drawn by logits fp32 [vocab]."""
        return self.forced.popleft() if self.forced else sampler.sample(logits)

    def note_end(self, token: int, count: int, *, full: bool) -> None:
        """Set `finish_reason` if `token`, the `count`th of the answer, is its last; `full`: no row is left for it."""
        if token in self.params.stop_ids:
            self.finish_reason = "stop"
        elif self.cancelled:
            self.finish_reason = "interrupted"
        elif count == self.params.max_tokens:
            self.finish_reason = "length"
        elif full:
            self.finish_reason = "context"
