"""Answers held to a form by masks, on a model that would never write such a thing by itself."""

from __future__ import annotations

import json
import sys
from typing import Any

import httpx2
import pytest

from hybrid.chat.forms import BadField, answer_grammar, calls_grammar, either
from hybrid.errors import MissingExtra
from hybrid.grammar import Grammars
from hybrid.kimi import Kimi

SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "minimum": 3, "maximum": 9}},
    "required": ["size", "count"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("look", "list.all")]
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}


def ask(client: httpx2.Client, **more: Any) -> dict[str, Any]:
    """The only choice of a drawn answer that may be long."""
    message = {"role": "user", "content": "hello"}
    body = {"messages": [message], "max_tokens": 600, "seed": 1, "thinking_budget": 8, **more}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def is_thing(text: str) -> bool:
    thing = json.loads(text)
    return set(thing) == {"size", "count"} and thing["size"] in ("small", "large") and 3 <= thing["count"] <= 9


@pytest.mark.parametrize("thinking", [True, False])
def test_a_schema(client: httpx2.Client, thinking: bool) -> None:
    choice = ask(client, response_format=FORMAT, enable_thinking=thinking)
    assert choice["finish_reason"] == "stop" and is_thing(choice["message"]["content"])
    assert bool(choice["message"].get("reasoning_content")) is thinking


def test_required_calls(client: httpx2.Client) -> None:
    choice = ask(client, tools=TOOLS, tool_choice="required")
    assert choice["finish_reason"] in ("tool_calls", "length") and not choice["message"]["content"]
    calls = choice["message"]["tool_calls"]
    assert calls and all(call["function"]["name"] in ("look", "list.all") for call in calls)
    assert all(is_thing(call["function"]["arguments"]) for call in calls)


def test_one_named_call(client: httpx2.Client) -> None:
    named = {"type": "function", "function": {"name": "list.all"}}
    (call,) = ask(client, tools=TOOLS, tool_choice=named, thinking={"type": "disabled"})["message"]["tool_calls"]
    assert call["function"]["name"] == "list.all" and is_thing(call["function"]["arguments"])


def test_other_apis(client: httpx2.Client) -> None:
    tool = {"name": "look", "input_schema": SCHEMA}
    messages = [{"role": "user", "content": "hello"}]
    body = {"messages": messages, "max_tokens": 600, "tools": [tool], "tool_choice": {"type": "tool", "name": "look"}}
    (block,) = client.post("/v1/messages", json=body).json()["content"]
    assert block["type"] == "tool_use" and is_thing(json.dumps(block["input"]))
    form = {"format": {"type": "json_schema", "name": "thing", "schema": SCHEMA}}
    body = {"input": "hello", "text": form, "reasoning": {"effort": "none"}, "max_output_tokens": 600}
    (item,) = client.post("/v1/responses", json=body).json()["output"]
    assert is_thing(item["content"][0]["text"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "grammar"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": TOOLS},
        {"tool_choice": "whatever", "tools": TOOLS},
    ],
)
def test_forms_that_are_none(client: httpx2.Client, wrong: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, **wrong}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_a_schema_cannot_smuggle_in_a_rule() -> None:
    with pytest.raises(BadField):
        answer_grammar({"type": "json_schema", "json_schema": {"schema": "x\nstart: /.*/"}})
    rule = calls_grammar([{"function": {"name": 'x" | /.*/ | "'}}], None)
    assert '"functions.x\\" | /.*/ | \\":"' in rule


def test_nothing_asked_for_is_no_grammar() -> None:
    assert either(None, None) is None and answer_grammar(None) is None and answer_grammar({"type": "text"}) is None


def test_without_the_package(kimi: Kimi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match="pip install"):
        Grammars(kimi.tokenizer, kimi.config.vocab_size, kimi.stop_ids).mask("start: /a/", False)
