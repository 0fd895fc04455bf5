"""What requests of every API have in common: a model's name, sampling, content."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from hybrid.chat.message import Message
from hybrid.chat.wishes import Sampled, Tolerant, known, require_tokens
from hybrid.engine.sampler import SamplingParams
from hybrid.errors import KimiError
from hybrid.kimi import Kimi
from hybrid.serve.refusal import Refusal


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


def to_messages(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Messages in OpenAI's shape as the template wants them. Raises Refusal for pictures and for other shapes."""
    found = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        _refuse_media(message.get("content"), where)
        try:
            found.append(Message.from_dict(message))
        except KimiError as error:
            raise Refusal(400, f"{where}: {error}", param=where) from error
    if not found:
        raise Refusal(400, "There are no messages.", param="messages")
    return found


def _refuse_media(content: Any, where: str) -> None:
    for part in content if isinstance(content, list) else ():
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind not in ("text", None):
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, Mapping) else image
            refuse_media(str(kind), str(url or ""), where)


def refuse_media(kind: str, url: str, where: str) -> None:
    """Raise the Refusal of content that is not text: whatever it names is neither fetched nor opened."""
    scheme = url.partition(":")[0].casefold()
    if scheme in ("http", "https"):
        why = "Pictures are not fetched from addresses: this server makes no requests of its own."
    elif scheme == "file":
        why = "Files of this machine are not read for clients."
    else:
        why = "Only text is read at the moment."
    raise Refusal(400, f"{where}: {kind} is refused. {why}", param=where, code=f"unsupported_{kind}")
