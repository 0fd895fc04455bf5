"""The body of a line: a request for a chat or for the continuation of a text, checked without a model.

Input is read tolerantly: fields that nobody here knows are ignored, nulls count as absent. What is known and cannot be
done is refused by name, so that no answer quietly differs from what was asked for.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrid.chat.forms import BadForm, answer_grammar, held_to
from hybrid.chat.message import Message
from hybrid.chat.switch import wanted_thinking
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

    `thinking` None leaves it to the model; `grammar` is the form of the answer, in Lark, where one was asked for.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool | None = None
    grammar: str | None = None
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
        return Asked(prompt=_prompt(given.get("prompt")), sampling=_sampling(given) | _told(given.get("logprobs")))
    messages, (tools, grammar) = _messages(given.get("messages")), _form(given)
    told = _told(given.get("top_logprobs", 0) if given.get("logprobs") else None)
    return Asked(messages, None, tools, _thinking(given), grammar, _sampling(given) | told)


# -- what cannot be done ----------------------------------------------------------------------------------------------
# Field -> the values that ask for nothing beyond what is done anyway.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "modalities": (["text"],),
    "audio": (),
}


def _refuse_unsupported(given: Mapping[str, Any]) -> None:
    for name, harmless in HARMLESS.items():
        if name in given and given[name] not in harmless:
            raise Refused(f"{name} is not supported in batches.", "unsupported_parameter", name)


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


def _form(given: Mapping[str, Any]) -> tuple[tuple[dict[str, Any], ...], str | None]:
    """The tools to declare, and the grammar that the answer is held to."""
    tools, wanted = given.get("tools", []), given.get("response_format")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("tools is not a list of objects.", param="tools")
    if not isinstance(wanted, dict | None):
        raise Refused("response_format is not an object.", param="response_format")
    try:
        declared, grammar = held_to(tools, given.get("tool_choice"), answer_grammar(wanted))
    except BadForm as error:
        raise Refused(str(error), error.code or "invalid_request", error.param) from error
    return tuple(declared or ()), grammar


def _prompt(given: Any) -> str | tuple[int, ...]:
    if isinstance(given, str) and given:
        return given
    if isinstance(given, list) and given and all(type(token) is int and token >= 0 for token in given):
        return tuple(given)
    raise Refused("prompt is neither a text nor a list of token ids.", param="prompt")


def _thinking(given: Mapping[str, Any]) -> bool | None:
    try:
        return wanted_thinking(given)
    except KimiError as error:
        raise Refused(error.message, param="thinking") from error


# -- how it is sampled ------------------------------------------------------------------------------------------------
LARGEST_SEED = (1 << 63) - 1
MOST_LIKELY = 20
ID = re.compile("[0-9]{1,9}")
NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: value >= 0, "0 or more"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "between -2 and 2"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "between -2 and 2"),
    "repetition_penalty": (lambda value: 0.1 <= value <= 10, "between 0.1 and 10"),
}
WHOLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "top_k": (lambda value: value >= 0, "0 (no limit) or more"),
    "seed": (lambda value: -LARGEST_SEED <= value <= LARGEST_SEED, "a number of 64 bits"),
    "max_tokens": (lambda value: value >= 1, "1 or more"),
}


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(given)
    given.setdefault("max_tokens", given.pop("max_completion_tokens", None))
    found: dict[str, Any] = {}
    for kinds, rules in (((int, float), NUMBERS), ((int,), WHOLE)):
        for name, (valid, meaning) in rules.items():
            value = given.get(name)
            if value is None:
                continue
            if not _is_number(value, kinds) or not valid(value):
                raise Refused(f"{name} is {value!r}; it must be {meaning}.", param=name)
            found[name] = value
    if "seed" in found:
        found["seed"] %= 1 << 63
    if stop := _stop(given.get("stop")):
        found["stop"] = stop
    if bias := _bias(given.get("logit_bias")):
        found["logit_bias"] = bias
    return found


def _is_number(value: Any, kinds: tuple[type, ...] = (int, float)) -> bool:
    return type(value) in kinds and math.isfinite(value)


def _stop(given: Any) -> tuple[str, ...]:
    """The strings that end an answer; empty ones, which some programs send, end nothing."""
    strings = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise Refused("stop is neither a text nor a list of texts.", param="stop")
    return tuple(string for string in strings if string)


def _bias(given: Any) -> tuple[tuple[int, float], ...]:
    """What is added to the logits of ids; whether the model has these ids is not known here."""
    pairs = list(given.items()) if isinstance(given, dict) else None if given is not None else []
    if pairs is None or not all(ID.fullmatch(key) and _is_number(value) and abs(value) <= 100 for key, value in pairs):
        raise Refused("logit_bias gives ids numbers between -100 and 100.", param="logit_bias")
    return tuple((int(key), value) for key, value in pairs)


def _told(count: Any) -> dict[str, Any]:
    """How many likeliest ids are told of for every token; nothing where nothing is to be told."""
    if count is None or count is False:
        return {}
    if type(count) is not int or not 0 <= count <= MOST_LIKELY:
        raise Refused(f"logprobs are told of 0 to {MOST_LIKELY} tokens.", param="top_logprobs")
    return {"logprobs": count}
