"""/v1/messages as Anthropic's own client sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from anthropic import Anthropic, APIStatusError, BadRequestError
from anthropic.types import Message

LOOK = {"name": "look", "description": "Look.", "input_schema": {"type": "object", "properties": {}}}
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
    '{"at": "sky"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)
THINKING = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture
def anthropic(address: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "any", "max_tokens": 200, "messages": [{"role": "user", "content": text}], **more}


def post(client: httpx2.Client, body: dict[str, Any]) -> Message:
    response = client.post("/v1/messages", json=body)
    assert response.status_code == 200, response.text
    return Message.model_validate_json(response.content, strict=True)


def blocks(message: Message) -> list[dict[str, Any]]:
    return [block.model_dump(exclude_none=True) for block in message.content]


def test_blocks_whole_and_streamed(client: httpx2.Client, anthropic: Anthropic) -> None:
    body = ask(f"say:hm</think>Let me see.{CALL}", thinking=THINKING, tools=[LOOK])
    whole = post(client, body)
    with anthropic.messages.stream(**body) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    expected = [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "functions.look:0", "name": "look", "input": {"at": "sky"}},
    ]
    assert blocks(whole) == blocks(streamed) == expected
    assert whole.stop_reason == streamed.stop_reason == "tool_use"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert whole.usage.output_tokens == streamed.usage.output_tokens


def test_the_model_reasons_when_asked_to(client: httpx2.Client) -> None:
    assert blocks(post(client, ask("say:plain<|im_end|>"))) == [{"type": "text", "text": "plain"}]
    assert post(client, ask("more", max_tokens=3)).stop_reason == "max_tokens"


def test_signs_of_life(client: httpx2.Client) -> None:
    assert "event: ping\n" in client.post("/v1/messages", json=ask("slow: x", stream=True, max_tokens=2)).text


def test_history_in_blocks_is_the_prompt_of_the_same_messages(client: httpx2.Client) -> None:
    history = [
        {"role": "user", "content": [{"type": "text", "text": "look"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "Sure."},
                {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "sky"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "blue"}]},
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    call = {"id": "functions.look:0", "function": {"name": "look", "arguments": {"at": "sky"}}}
    same = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": "Sure.", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.look:0", "content": "blue"},
        {"role": "user", "content": "and?"},
    ]
    ids = client.post("/tokenize", json={"messages": same, "thinking": True}).json()["tokens"]
    request = {"model": "any", "messages": history, "system": "Be kind.", "thinking": THINKING}
    assert client.post("/v1/messages/count_tokens", json=request).json() == {"input_tokens": len(ids)}
    usage = post(client, request | {"max_tokens": 2}).usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == len(ids)


def test_the_sdk_counts(anthropic: Anthropic) -> None:
    few = anthropic.messages.count_tokens(model="any", messages=[{"role": "user", "content": "hi"}])
    many = anthropic.messages.count_tokens(**{k: v for k, v in ask("hi", tools=[LOOK]).items() if k != "max_tokens"})
    assert 0 < few.input_tokens < many.input_tokens


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tool_choice": {"type": "any"}}, "no tools"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"url": "http://x/y"}}]}]}, "fetched"),
        ({"messages": []}, "no messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "2,048"),
    ],
)
def test_refusals_say_why(anthropic: Anthropic, change: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequestError, match=named) as caught:
        anthropic.messages.create(**ask("hi") | change)
    assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


def test_errors_in_the_middle(anthropic: Anthropic) -> None:
    with pytest.raises(APIStatusError, match="not numbers"):
        anthropic.messages.create(**ask("fail: now"))
    with pytest.raises(APIStatusError, match="not numbers"):
        list(anthropic.messages.create(**ask("fail: now"), stream=True))
