"""What requests of every API have in common: a model's name, sampling, what they come to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from hybrid.chat.message import Message
from hybrid.chat.wishes import Sampled, Tolerant, known, require_tokens
from hybrid.engine.sampler import SamplingParams
from hybrid.kimi import Kimi


class Asked(Tolerant):
    """Fields that no endpoint knows are ignored."""

    model: str | None = Field(None, description="Any name will do: there is one model, whose name is in the answer.")
    stream: bool | None = False


@dataclass(frozen=True)
class Turn:
    """What every API's request for the next turn of a conversation comes to."""

    messages: Sequence[Message]
    params: SamplingParams
    tools: Sequence[dict[str, Any]] | None
    thinking: bool
    think_budget: int | None = None
    grammar: str | None = None  # the form of the answer, in Lark
    keep: bool = True  # whether anything of it may stay on disk


def params(kimi: Kimi, body: Sampled, thinking: bool, **more: Any) -> SamplingParams:
    """The model's own settings, changed by what `body` and `more` give. Raises BadField for unknown tokens."""
    given = body.sampling() | known(more)
    require_tokens(given, kimi.config.vocab_size)
    return replace(kimi.default_params(thinking), **given)


def effective_thinking(kimi: Kimi, wanted: bool | None) -> bool:
    """Whether to reason: as wanted, else as the model does; a model that cannot reason never does."""
    return kimi.default_thinking and wanted is not False
