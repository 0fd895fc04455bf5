"""A conversation as the template wants it: no nulls, and the model's own kind of tool-call ids.

The model numbers its calls functions.NAME:0, functions.NAME:1, ... through the whole conversation. Ids of another kind
(call_x7f, UUIDs) derail it: it answers nothing or writes broken calls. So they are renamed, and with them the results'
references.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hybrid.chat.message import Message
from hybrid.errors import KimiError

NATIVE_ID = re.compile(r"functions\.(?P<name>.+):[0-9]+", re.DOTALL)

Turn = dict[str, Any]


def prepare(messages: Iterable[Message | Mapping[str, Any]]) -> list[Turn]:
    """OpenAI-style dicts of `messages`, ready for a chat template; the originals are left alone.

    Raises KimiError for a message without a role or with calls that name no function.
    """
    turns = [_turn(message) for message in messages]
    _number_calls(turns)
    return turns


def _turn(message: Message | Mapping[str, Any]) -> Turn:
    fields = message.to_dict() if isinstance(message, Message) else message
    # A template prints a null as the word None; an empty list of calls must count as no calls.
    turn = {key: value for key, value in fields.items() if value is not None and (key != "tool_calls" or value)}
    if not isinstance(turn.get("role"), str):
        raise KimiError("A message has no role.", 'Messages look like {"role": "user", "content": "..."}.')
    turn.setdefault("content", "")
    if "tool_calls" in turn:
        turn["tool_calls"] = [_call(call) for call in turn["tool_calls"]]
    return turn


def _call(call: Mapping[str, Any]) -> Turn:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise KimiError("A tool call in the history names no function.", 'It needs {"function": {"name": ...}}.')
    arguments = function.get("arguments")
    return {
        "id": str(call.get("id") or ""),
        "type": "function",
        "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
    }


def _calls(turn: Turn) -> list[Turn]:
    return turn.get("tool_calls", [])


def _has_native_ids(calls: list[Turn]) -> bool:
    """Whether every call has an id of the model's own kind, and each a different one."""
    matches = [NATIVE_ID.fullmatch(call["id"]) for call in calls]
    named = all(m and m["name"] == call["function"]["name"] for m, call in zip(matches, calls, strict=True))
    return named and len({call["id"] for call in calls}) == len(calls)


def _number_calls(turns: list[Turn]) -> None:
    """Number all calls through unless they have native ids, and let each result name the call it answers."""
    calls = [call for turn in turns for call in _calls(turn)]
    keep = _has_native_ids(calls)
    numbers = iter(range(len(calls)))
    renamed: dict[str, str] = {}
    waiting: list[tuple[str, str]] = []
    for turn in turns:
        if calls := _calls(turn):
            waiting = [(call["id"], _number(call, next(numbers), keep)) for call in calls]
            renamed.update(waiting)
        elif turn["role"] == "tool":
            turn["tool_call_id"] = _answered(str(turn.get("tool_call_id", "")), waiting, renamed)


def _number(call: Turn, number: int, keep: bool) -> str:
    if not keep:
        call["id"] = f"functions.{call['function']['name']}:{number}"
    return call["id"]


def _answered(given: str, waiting: list[tuple[str, str]], renamed: Mapping[str, str]) -> str:
    """The new id of the call that the result for `given` answers. Of the last turn's calls with that id the first one
    without a result; else an earlier one; a result that names no call answers the next one without a result."""
    for index, (old, new) in enumerate(waiting):
        if old == given:
            del waiting[index]
            return new
    if given in renamed or NATIVE_ID.fullmatch(given) or not waiting:
        return renamed.get(given, given)
    return waiting.pop(0)[1]
