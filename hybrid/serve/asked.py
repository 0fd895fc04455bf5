"""What requests of every API have in common: sampling, the thinking switch in its spellings, content, tools."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from hybrid.chat.message import Message
from hybrid.engine.sampler import SamplingParams
from hybrid.errors import KimiError
from hybrid.kimi import Kimi
from hybrid.serve.refusal import Refusal, bad_request, unsupported

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
MAX_LOGPROBS = 20
GREEDY = 1e-3  # a temperature below which logits divided by it would overflow, and which is greedy anyway

Positive = Annotated[int, Field(ge=1)]


class Asked(BaseModel):
    """Fields that no endpoint knows are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = Field(None, description="Any name will do: there is one model, whose name is in the answer.")
    stream: bool | None = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None


class Penalised(Asked):
    """What OpenAI's own APIs have beyond that."""

    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None


class ThinkingSwitch(BaseModel):
    """`{"type": "enabled" | "disabled"}`, as Moonshot and Anthropic write it."""

    model_config = ConfigDict(extra="ignore")

    type: str
    budget_tokens: Positive | None = None


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


def params(kimi: Kimi, body: Asked, thinking: bool, **more: Any) -> SamplingParams:
    """The model's own settings, changed by what `body` and `more` give. Raises Refusal for impossible values."""
    given = {name: getattr(body, name, None) for name in SAMPLING + PENALTIES}
    given |= {"logit_bias": _bias(kimi, getattr(body, "logit_bias", None))} | more
    known = {name: value for name, value in given.items() if value is not None}
    if "seed" in known:
        known["seed"] %= 1 << 63
    if 0 < known.get("temperature", 1) < GREEDY:
        known["temperature"] = 0
    if not 0.1 <= known.get("repetition_penalty", 1) <= 10:
        raise Refusal(400, "repetition_penalty must be between 0.1 and 10.", param="repetition_penalty")
    try:
        return replace(kimi.default_params(thinking), **known)
    except KimiError as error:
        raise bad_request(error, (*SAMPLING, *PENALTIES, "max_tokens", "logit_bias")) from error


def stops(given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The strings that end an answer; empty ones, which some clients send, end nothing."""
    strings = [given] if isinstance(given, str) else given or ()
    return tuple(string for string in strings if string) or None


def _bias(kimi: Kimi, given: Mapping[str, float] | None) -> tuple[tuple[int, float], ...] | None:
    if not given:
        return None
    size = kimi.config.vocab_size
    wrong = [key for key in given if not (key.isdecimal() and int(key) < size)]
    if wrong:
        raise Refusal(400, f"logit_bias names {wrong[0]!r}, which is no token of {size:,}.", param="logit_bias")
    if not all(abs(value) <= 100 for value in given.values()):
        raise Refusal(400, "logit_bias must be between -100 and 100.", param="logit_bias")
    return tuple((int(key), value) for key, value in given.items())


def effective_thinking(kimi: Kimi, wanted: bool | None) -> bool:
    """Whether to reason: as wanted, else as the model does; a model that cannot reason never does."""
    return kimi.default_thinking and wanted is not False


def refuse_several(n: int | None) -> None:
    if n not in (None, 1):
        raise unsupported("n", "One answer per request is made here. Send the request several times.")


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
