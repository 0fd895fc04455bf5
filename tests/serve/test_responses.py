"""/v1/responses as OpenAI's own client sees it."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from openai import BadRequestError, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

PATH = "/v1/responses"
LOOK = {"type": "function", "name": "look", "description": "Look.", "parameters": {"type": "object"}}
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
    '{"at": "sky"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def ask(text: Any, **more: Any) -> dict[str, Any]:
    return {"model": "any", "input": text, "max_output_tokens": 200, **more}


def post(client: httpx2.Client, body: dict[str, Any]) -> Response:
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return Response.model_validate_json(response.content, strict=True)


def events(client: httpx2.Client, body: dict[str, Any]) -> list[Any]:
    response = client.post(PATH, json=body | {"stream": True})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [EVENTS.validate_json(line, strict=True) for line in lines]


def shape(response: Response) -> list[Any]:
    return [item.model_dump(exclude={"id"}, exclude_none=True) for item in response.output]


def test_items_whole_and_streamed(client: httpx2.Client, openai: OpenAI) -> None:
    body = ask(f"say:hm</think>Let me see.{CALL}", tools=[LOOK])
    whole, streamed = post(client, body), events(client, body)
    reasoning, message, call = whole.output
    assert reasoning.type == "reasoning" and reasoning.content and reasoning.content[0].text == "hm"
    assert message.type == "message" and whole.output_text == "Let me see."
    assert call.type == "function_call" and (call.call_id, call.arguments) == ("functions.look:0", '{"at": "sky"}')
    assert streamed[-1].type == "response.completed" and shape(streamed[-1].response) == shape(whole)
    assert [event.sequence_number for event in streamed] == list(range(len(streamed)))
    kinds = [event.type for event in streamed]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    with openai.responses.stream(**body) as stream:
        assert [event for event in stream] and shape(stream.get_final_response()) == shape(whole)


def test_what_is_cut_off_is_incomplete(client: httpx2.Client) -> None:
    response = post(client, ask("go on", max_output_tokens=3, reasoning={"effort": "none"}))
    assert response.status == "incomplete" and response.usage and response.usage.output_tokens == 3
    assert response.incomplete_details and response.incomplete_details.reason == "max_output_tokens"
    assert events(client, ask("go on", max_output_tokens=3))[-1].type == "response.incomplete"


def test_items_of_history_are_the_same_messages(client: httpx2.Client) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "look"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Sure."}]},
        {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": '{"at": "sky"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "blue"},
    ]
    call = {"id": "call_1", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    same = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": "Sure.", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "blue"},
    ]
    ids = client.post("/tokenize", json={"messages": same}).json()["tokens"]
    usage = post(client, ask(items, instructions="Be kind.", max_output_tokens=1)).usage
    assert usage and usage.input_tokens == len(ids)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "grammar"}}}, "response_format"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///x"}]}]}, "input[0]"),
        ({"input": []}, "input"),
    ],
)
def test_what_is_wrong_is_named(openai: OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        openai.responses.create(**ask("hi") | change)
    assert caught.value.param == param


def test_errors_in_the_middle(client: httpx2.Client) -> None:
    last = events(client, ask("fail: now"))[-1]
    assert last.type == "response.failed" and "not numbers" in last.response.error.message
    assert client.post(PATH, json=ask("fail: now")).status_code == 500
