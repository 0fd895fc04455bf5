"""What is said: parts as the model streams them, and the messages of a conversation."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hybrid.errors import KimiError


@dataclass(frozen=True)
class Think:
    """Reasoning that is not part of the answer."""

    text: str


@dataclass(frozen=True)
class Text:
    """The answer."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call the model asks for: `id` is functions.NAME:i, `arguments` the model's JSON text, unparsed."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class CallPiece:
    """More of a call that is still being written, for those who ask for it; the ToolCall follows when it is whole."""

    id: str
    name: str
    arguments: str


Part = Think | Text | ToolCall | CallPiece


@dataclass(frozen=True)
class Message:
    """One turn. `interrupted` marks an assistant's turn that was stopped before its end."""

    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The shape of OpenAI's API (plus reasoning_content and interrupted), without the fields that are not set."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [_call_to_dict(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        if self.interrupted:
            message["interrupted"] = True
        return message

    @classmethod
    def from_dict(cls, message: Mapping[str, Any]) -> "Message":
        """The inverse of `to_dict`; unknown keys are ignored. Raises KimiError if `message` has another shape.

        As programs spell it, too: role "developer" is the system's, `reasoning` stands for `reasoning_content`.
        """
        try:
            role, thoughts = _text(message, "role"), _optional_text(message, "reasoning_content")
            return cls(
                role="system" if role == "developer" else role,
                content=_content(message.get("content")),
                reasoning_content=_optional_text(message, "reasoning") if thoughts is None else thoughts,
                tool_calls=tuple(_call_from_dict(call) for call in message.get("tool_calls") or ()),
                tool_call_id=_optional_text(message, "tool_call_id"),
                name=_optional_text(message, "name"),
                interrupted=bool(message.get("interrupted", False)),
            )
        except (AttributeError, TypeError, ValueError) as error:
            remedy = 'Messages look like {"role": "user", "content": "..."}.'
            raise KimiError(f"A message cannot be understood: {error}.", remedy) from error

    @classmethod
    def from_parts(cls, parts: Iterable[Part], *, interrupted: bool = False) -> "Message":
        """An assistant's turn from the parts it was streamed in."""
        thoughts, answer, calls = [], [], []
        for part in parts:
            match part:
                case Think(text):
                    thoughts.append(text)
                case Text(text):
                    answer.append(text)
                case ToolCall():
                    calls.append(part)
        return cls("assistant", "".join(answer), "".join(thoughts) or None, tuple(calls), interrupted=interrupted)


def join_parts(parts: Iterable[Part]) -> list[Part]:
    """The same parts with neighbouring texts of one kind put together."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Think) and isinstance(last, Think):
            joined[-1] = Think(last.text + part.text)
        elif isinstance(part, Text) and isinstance(last, Text):
            joined[-1] = Text(last.text + part.text)
        else:
            joined.append(part)
    return joined


def _call_to_dict(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_from_dict(call: Mapping[str, Any]) -> ToolCall:
    function = call.get("function") or {}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    return ToolCall(_optional_text(call, "id") or "", _text(function, "name"), arguments)


def _content(content: Any) -> str:
    """Text, also when it comes as a list of text parts."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.get("type", "text") != "text":
            raise ValueError(f"content of type {part['type']!r} in a conversation of text")
    return "".join(_text(part, "text") for part in content)


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = _optional_text(fields, key)
    if value is None:
        raise ValueError(f"{key!r} is missing")
    return value


def _optional_text(fields: Mapping[str, Any], key: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key!r} is {value!r} and not text")
    return value
