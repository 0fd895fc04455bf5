"""Messages: OpenAI's shape, there and back."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.chat.message import Message, Part, Text, Think, ToolCall, join_parts
from hybrid.errors import KimiError

CALLS = st.builds(ToolCall, st.text(), st.text(), st.text())
MESSAGES = st.builds(
    Message,
    role=st.text(),
    content=st.text(),
    reasoning_content=st.none() | st.text(),
    tool_calls=st.lists(CALLS, max_size=2).map(tuple),
    tool_call_id=st.none() | st.text(),
    name=st.none() | st.text(),
    interrupted=st.booleans(),
)
PARTS = st.lists(st.one_of(st.builds(Think, st.text()), st.builds(Text, st.text()), CALLS))


@given(MESSAGES)
def test_there_and_back(message: Message) -> None:
    assert Message.from_dict(message.to_dict()) == message


def test_the_shape_is_openais() -> None:
    message = Message("assistant", "hi", tool_calls=(ToolCall("functions.f:0", "f", '{"a": 1}'),))
    assert message.to_dict() == {
        "role": "assistant",
        "content": "hi",
        "tool_calls": [{"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    }
    assert Message("user", "q").to_dict() == {"role": "user", "content": "q"}


def test_other_ways_to_write_it() -> None:
    assert Message.from_dict({"role": "user"}) == Message("user", "")
    assert Message.from_dict({"role": "user", "content": None, "tool_calls": None}) == Message("user", "")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Message.from_dict({"role": "user", "content": parts, "unknown": 1}) == Message("user", "ab")
    call = {"function": {"name": "f", "arguments": {"a": "é"}}}
    assert Message.from_dict({"role": "assistant", "tool_calls": [call]}).tool_calls[0].arguments == '{"a": "é"}'


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"role": None},
        {"role": 5},
        {"role": "user", "content": 5},
        {"role": "user", "content": [5]},
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "name": 5},
        {"role": "assistant", "tool_calls": 5},
        {"role": "assistant", "tool_calls": [{"id": "x"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": None}}]},
        5,
    ],
)
def test_what_is_no_message(message: Any) -> None:
    with pytest.raises(KimiError, match="A message cannot be understood") as error:
        Message.from_dict(message)
    assert error.value.remedy


@given(PARTS)
def test_joining_parts_changes_nothing(parts: list[Part]) -> None:
    joined = join_parts(parts)
    assert Message.from_parts(joined) == Message.from_parts(parts)
    kinds = [type(part) for part in joined]
    assert all(a is ToolCall or a is not b for a, b in zip(kinds, kinds[1:], strict=False))


def test_a_turn_from_its_parts() -> None:
    call = ToolCall("functions.f:0", "f", "{}")
    parts: list[Part] = [Think("a"), Think("b"), Text("c"), call, Text("d")]
    assert Message.from_parts(parts, interrupted=True) == Message("assistant", "cd", "ab", (call,), interrupted=True)
    assert Message.from_parts([]) == Message("assistant", "")
