"""One request on its way through the engine."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hybrid.engine.sampler import SamplingParams


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
