"""The body of a line: a request for a chat or for the continuation of a text, checked without a model.

All but messages and prompts is read by `hybrid.chat.wishes`, as the server does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from hybrid.chat.forms import UNSUPPORTED, BadField
from hybrid.chat.message import Message
from hybrid.chat.wishes import ChatWishes, TextWishes, explained
from hybrid.errors import KimiError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Refused(KimiError):
    """A request that cannot be answered: `code` for programs, `param` the field at fault if it is one."""

    def __init__(self, message: str, code: str = "invalid_request", param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(frozen=True)
class Asked:
    """What is to be answered: `messages`, or `prompt` (text or ids) to be continued; `sampling` holds what was given.

    `thinking` None leaves it to the model; `think_budget` is the most tokens of it. `grammar` is the form of the
    answer, in Lark, where one was asked for. Without `keep` nothing of it may stay on disk.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool | None = None
    think_budget: int | None = None
    grammar: str | None = None
    keep: bool = True
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        return self.prompt is None


def read_body(url: Any, body: Mapping[str, Any]) -> Asked:
    """The request in `body` for the endpoint `url`. Raises Refused."""
    if url not in (CHAT, COMPLETIONS):
        raise Refused(f"url {url!r} is not answered here; {CHAT} and {COMPLETIONS} are.", "unsupported_url", "url")
    _refuse_unsupported(body)
    try:
        return _chat(body) if url == CHAT else _text(body)
    except ValidationError as error:
        message, field_ = explained(error.errors())
        raise Refused(message, param=field_) from error
    except BadField as error:
        raise Refused(str(error), error.code or "invalid_request", error.param) from error


def _chat(body: Mapping[str, Any]) -> Asked:
    wishes = ChatWishes.model_validate(body)
    tools, grammar = wishes.form()
    return Asked(
        _messages(body.get("messages")),
        tools=tuple(tools or ()),
        thinking=wishes.reasoning(),
        think_budget=wishes.budget(),
        grammar=grammar,
        keep=wishes.store is not False,
        sampling=wishes.sampling(),
    )


def _text(body: Mapping[str, Any]) -> Asked:
    return Asked(prompt=_prompt(body.get("prompt")), sampling=TextWishes.model_validate(body).sampling())


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    """What the server does and a file has no place for."""
    for name in ("stream", "echo"):
        if body.get(name) not in (None, False):
            raise Refused(f"{name} is not supported in batches.", UNSUPPORTED, name)


def _messages(given: Any) -> tuple[Message, ...]:
    if not isinstance(given, list) or not given:
        raise Refused("messages is not a list of messages.", param="messages")
    return tuple(_message(message, f"messages[{at}]") for at, message in enumerate(given))


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise Refused(f"{where} is not an object.", param=where)
    parts = given.get("content")
    for part in parts if isinstance(parts, list) else ():
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text":
            raise Refused(f"{where} holds {kind or 'no text'}; only text is read.", "unsupported_content", where)
    try:
        return Message.from_dict(given)
    except KimiError as error:
        raise Refused(f"{where}: {error.message}", param=where) from error


def _prompt(given: Any) -> str | tuple[int, ...]:
    if isinstance(given, str) and given:
        return given
    if isinstance(given, list) and given and all(type(token) is int and token >= 0 for token in given):
        return tuple(given)
    raise Refused("prompt is neither a text nor a list of token ids.", param="prompt")
