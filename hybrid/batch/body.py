"""The body of a line: a request for a chat or for the continuation of a text, checked without a model.

Input is read tolerantly: fields that nobody here knows are ignored, nulls count as absent. What is known and cannot be
done is refused by name, so that no answer quietly differs from what was asked for.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrid.chat.message import Message
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

    `thinking` None leaves it to the model.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        return self.prompt is None


def read_body(url: Any, body: Mapping[str, Any]) -> Asked:
    """The request in `body` for the endpoint `url`. Raises Refused."""
    given = {name: value for name, value in body.items() if value is not None}
    if url not in (CHAT, COMPLETIONS):
        raise Refused(f"url {url!r} is not answered here; {CHAT} and {COMPLETIONS} are.", "unsupported_url", "url")
    _refuse_unsupported(given)
    if url == COMPLETIONS:
        return Asked(prompt=_prompt(given.get("prompt")), sampling=_sampling(given))
    messages, tools = _messages(given.get("messages")), _tools(given)
    return Asked(messages, None, tools, _thinking(given), _sampling(given))


# -- what cannot be done ----------------------------------------------------------------------------------------------
# Field -> the values that ask for nothing beyond what is done anyway.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "stop": ("", []),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "modalities": (["text"],),
    "audio": (),
}
CHOICES = ("auto", "none")


def _refuse_unsupported(given: Mapping[str, Any]) -> None:
    for name, harmless in HARMLESS.items():
        if name in given and given[name] not in harmless:
            raise Refused(f"{name} is not supported in batches.", "unsupported_parameter", name)
    if given.get("tool_choice", "auto") not in CHOICES:
        raise Refused("tool_choice can only be auto or none.", "unsupported_parameter", "tool_choice")


# -- what is asked ----------------------------------------------------------------------------------------------------
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


def _tools(given: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = given.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("tools is not a list of objects.", param="tools")
    return () if given.get("tool_choice") == "none" else tuple(tools)


def _prompt(given: Any) -> str | tuple[int, ...]:
    if isinstance(given, str) and given:
        return given
    if isinstance(given, list) and given and all(type(token) is int and token >= 0 for token in given):
        return tuple(given)
    raise Refused("prompt is neither a text nor a list of token ids.", param="prompt")


def _thinking(given: Mapping[str, Any]) -> bool | None:
    """The switch in its four spellings: chat_template_kwargs, thinking, enable_thinking, reasoning_effort."""
    nested = given.get("chat_template_kwargs")
    switches = [nested.get("thinking") if isinstance(nested, dict) else None, given.get("enable_thinking")]
    kind = given.get("thinking")
    kind = kind.get("type") if isinstance(kind, dict) else kind
    switches.append({"enabled": True, "disabled": False}.get(kind, kind) if isinstance(kind, str) else kind)
    effort = given.get("reasoning_effort")
    switches.append(None if effort is None else effort != "none")
    found = next((switch for switch in switches if switch is not None), None)
    if found not in (None, True, False):
        raise Refused(f"thinking is {found!r}.", param="thinking")
    return found


# -- how it is sampled ------------------------------------------------------------------------------------------------
LARGEST_SEED = (1 << 63) - 1
NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: value >= 0, "0 or more"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "between 0 and 1"),
}
WHOLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "top_k": (lambda value: value >= 0, "0 (no limit) or more"),
    "seed": (lambda value: -LARGEST_SEED <= value <= LARGEST_SEED, "a number of 64 bits"),
    "max_tokens": (lambda value: value >= 1, "1 or more"),
}


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(given)
    given.setdefault("max_tokens", given.pop("max_completion_tokens", None))
    found = {}
    for kinds, rules in (((int, float), NUMBERS), ((int,), WHOLE)):
        for name, (valid, meaning) in rules.items():
            value = given.get(name)
            if value is None:
                continue
            if type(value) not in kinds or not math.isfinite(value) or not valid(value):
                raise Refused(f"{name} is {value!r}; it must be {meaning}.", param=name)
            found[name] = value
    if "seed" in found:
        found["seed"] %= 1 << 63
    return found
