"""The body of a line: a request for a chat or for the continuation of a text, checked without a model.

It is read by `hybrid.chat.bodies`, as the server does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from hybrid.chat.bodies import ChatBody, TextBody
from hybrid.chat.forms import UNSUPPORTED, BadField
from hybrid.chat.message import Message
from hybrid.chat.wishes import explained
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
    wishes = ChatBody.model_validate(body)
    tools, grammar = wishes.form()
    return Asked(
        tuple(wishes.said()),
        tools=tuple(tools or ()),
        thinking=wishes.reasoning(),
        think_budget=wishes.budget(),
        grammar=grammar,
        keep=wishes.store is not False,
        sampling=wishes.sampling(),
    )


def _text(body: Mapping[str, Any]) -> Asked:
    wishes = TextBody.model_validate(body)
    first, *more = wishes.prompts()
    if more:
        raise BadField(f"There are {1 + len(more)} prompts. Give each a line.", "prompt")
    return Asked(prompt=first if isinstance(first, str) else tuple(first), sampling=wishes.sampling())


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    """What the server does and a file has no place for."""
    for name in ("stream", "echo"):
        if body.get(name) not in (None, False):
            raise Refused(f"{name} is not supported in batches.", UNSUPPORTED, name)
