"""Messages and prompts, read alike over HTTP and in a file: what is said, and what is refused by which name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hybrid.batch.body import CHAT, COMPLETIONS, Refused, read_body
from hybrid.chat.bodies import ChatBody, TextBody, prompt_ids, read_messages, refuse_media
from hybrid.chat.forms import BadField
from hybrid.chat.message import Message, ToolCall
from hybrid.chat.tokenizer import Tokenizer
from hybrid.chat.wishes import explained
from hybrid.serve.chat import ChatRequest
from hybrid.serve.completions import CompletionRequest

CALL = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def said(body: dict[str, Any]) -> list[Message]:
    return ChatBody.model_validate(body).said()


def test_a_conversation_as_programs_spell_it() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"text": "b"}], "whatever": 1},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "reasoning": "why", "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "functions.f:0"},
    ]
    assert said({"messages": messages}) == [
        Message("system", "ab"),
        Message("user", "hi"),
        Message("assistant", "", "why", (ToolCall("functions.f:0", "f", '{"a": 1}'),)),
        Message("tool", "1", tool_call_id="functions.f:0"),
    ]


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("text", ["text"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [7]], ["a", [7]]),
    ],
)
def test_prompts_in_their_spellings(given: Any, prompts: list[Any]) -> None:
    assert TextBody.model_validate({"prompt": given}).prompts() == prompts


@pytest.mark.parametrize("given", ["", [], [""], ["a", ""]])
def test_an_empty_prompt_is_refused(given: Any) -> None:
    with pytest.raises(BadField, match="empty prompt") as refused:
        TextBody.model_validate({"prompt": given}).prompts()
    assert refused.value.param == "prompt"


@pytest.mark.parametrize("given", [None, 5, True, {}, [None], [1, "x"], [-1], [1.5], [True], [[]], [["x"]]])
def test_what_is_no_prompt_is_refused_by_the_fields_name(given: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        TextBody.model_validate({"prompt": given})
    assert explained(refused.value.errors())[1] == "prompt"


def test_ids_are_those_of_the_model(tokenizer: Tokenizer) -> None:
    assert prompt_ids(tokenizer, [1, 2], 3) == [1, 2]
    assert prompt_ids(tokenizer, "<|im_end|>", 10**9) == tokenizer.encode("<|im_end|>"), "no control token"
    with pytest.raises(BadField, match="Token 3 does not exist: there are 3") as refused:
        prompt_ids(tokenizer, [1, 3], 3)
    assert refused.value.param == "prompt"


@pytest.mark.parametrize("url", ["https://example.org/x.png", "file:///etc/passwd", "data:image/png;base64,AA", ""])
def test_media_are_refused_by_their_place(url: str) -> None:
    with pytest.raises(BadField) as refused:
        refuse_media("image_url", url, "messages[3]")
    assert (refused.value.param, refused.value.code) == ("messages[3]", "unsupported_image_url")


def test_places_have_the_name_that_the_api_gives_them() -> None:
    wrong = [{"role": "user", "content": "x"}, {"role": 3}]
    for place, param in (("messages[{}]", "messages[1]"), ("input", "input")):
        with pytest.raises(BadField) as refused:
            read_messages(wrong, place)
        assert refused.value.param == param
        with pytest.raises(BadField) as refused:
            read_messages([], place)
        assert refused.value.param == param.removesuffix("[1]")


def outcome(model: type[ChatBody] | type[TextBody], body: dict[str, Any]) -> Any:
    """What the server makes of a body, or the (field, message) of what it refuses."""
    try:
        found = model.model_validate(body)
        return found.said() if isinstance(found, ChatBody) else found.prompts()
    except ValidationError as error:
        return explained(error.errors())[::-1]
    except BadField as error:
        return error.param, str(error)


def in_a_file(url: str, body: dict[str, Any]) -> Any:
    try:
        asked = read_body(url, body)
    except Refused as why:
        return why.param, str(why)
    return (
        list(asked.messages)
        if asked.is_chat
        else [list(asked.prompt) if isinstance(asked.prompt, tuple) else asked.prompt]
    )


WORDS = st.sampled_from(["user", "assistant", "text", "image_url", "", "x"])
PARTS = st.fixed_dictionaries({}, optional={"type": WORDS, "text": WORDS | st.integers(), "image_url": WORDS})
CONTENTS = st.none() | WORDS | st.integers() | st.lists(PARTS | WORDS, max_size=2)
TURNS = st.fixed_dictionaries(
    {},
    optional={
        "role": WORDS | st.none(),
        "content": CONTENTS,
        "name": WORDS,
        "tool_calls": st.none() | st.just([CALL]) | st.just([{}]),
    },
)
IDS = st.lists(st.integers(-1, 9) | st.booleans(), max_size=3)


@given(st.none() | WORDS | st.lists(TURNS | WORDS, max_size=3))
def test_messages_mean_the_same_in_a_file(messages: Any) -> None:
    body = {"messages": messages}
    assert in_a_file(CHAT, body) == outcome(ChatRequest, body)


@given(st.none() | WORDS | st.integers() | IDS | st.lists(WORDS | IDS, max_size=1))
def test_a_prompt_means_the_same_in_a_file(prompt: Any) -> None:
    body = {"prompt": prompt}
    assert in_a_file(COMPLETIONS, body) == outcome(CompletionRequest, body)
