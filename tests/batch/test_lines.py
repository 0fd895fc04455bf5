"""What lines may look like, and what is said about those that cannot be answered."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.batch.body import CHAT, COMPLETIONS, Refused, read_body
from hybrid.batch.lines import Bad, Line, described, read_lines
from hybrid.errors import UsageError

HI = [{"role": "user", "content": "hi"}]


def lines(*objects: Any, **more: Any) -> Any:
    raw = [each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in objects]
    return read_lines(raw, **more)


def only(*objects: Any, **more: Any) -> Line:
    found = lines(*objects, **more)
    assert not found.bad, found.bad
    return found.good[0]


def refusal(one: Any) -> Refused:
    found = lines(one)
    assert not found.good
    return found.bad[0].why


def test_openai_form_and_short_forms() -> None:
    full = only({"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": HI, "max_tokens": 5}})
    assert (full.number, full.custom_id, full.asked.sampling) == (1, "a", {"max_tokens": 5})
    for short in ({"body": {"messages": HI}}, {"messages": HI}, {"prompt": "hi"}):
        line = only(short)
        assert line.custom_id == "line-1" and [m.content for m in line.asked.messages] == ["hi"]
    assert only({"url": COMPLETIONS, "body": {"prompt": "hi"}}).asked.prompt == "hi"
    assert only({"url": COMPLETIONS, "body": {"prompt": [1, 2]}}).asked.prompt == (1, 2)
    assert only({"body": {"prompt": "hi"}}).asked.prompt == "hi"


def test_text_lines_and_their_system_prompt() -> None:
    found = lines(b"one\n", b"\n", b'{"not": "JSON here"}\r\n', text=True, system="Be brief.")
    assert found.empty == 1 and [line.custom_id for line in found.good] == ["line-1", "line-3"]
    assert [m.content for m in found.good[1].asked.messages] == ["Be brief.", '{"not": "JSON here"}']
    assert [m.role for m in found.good[1].asked.messages] == ["system", "user"]


def test_one_name_for_two_lines_is_refused_naming_both() -> None:
    with pytest.raises(UsageError, match="Lines 1 and 3 have the same custom_id 'a'"):
        lines({"custom_id": "a", "prompt": "x"}, {"prompt": "y"}, {"custom_id": "a", "prompt": "z"})
    with pytest.raises(UsageError, match="Lines 1 and 2"):
        lines({"custom_id": "line-2", "prompt": "x"}, {"prompt": "y"})


@pytest.mark.parametrize("one, param, code", [
    (b"nonsense\n", None, "invalid_line"),
    (b"\xff\xfe\n", None, "invalid_line"),
    (b"[" * 100_000, None, "invalid_line"),
    ([1], None, "invalid_line"),
    ({"x": 1}, None, "invalid_line"),
    ({"custom_id": 3, "prompt": "x"}, "custom_id", "invalid_custom_id"),
    ({"body": 3}, "body", "invalid_body"),
    ({"method": "GET", "prompt": "x"}, "method", "invalid_method"),
    ({"url": "/v1/embeddings", "body": {"input": "x"}}, "url", "unsupported_url"),
    ({"url": ["x"], "body": {}}, "url", "unsupported_url"),
    ({"messages": []}, "messages", "invalid_request"),
    ({"messages": [3]}, "messages.0", "invalid_request"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "invalid_request"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]", "unsupported_image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0]", "invalid_request"),
    ({"messages": HI, "n": 2}, "n", "unsupported_parameter"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_request"),
    ({"messages": HI, "stop": 3}, "stop", "invalid_request"),
    ({"messages": HI, "stop": ["a", None]}, "stop", "invalid_request"),
    ({"messages": HI, "presence_penalty": 3}, "presence_penalty", "invalid_request"),
    ({"messages": HI, "repetition_penalty": 0}, "repetition_penalty", "invalid_request"),
    ({"messages": HI, "logit_bias": {"x": 1}}, "logit_bias", "invalid_request"),
    ({"messages": HI, "logit_bias": {"1": 101}}, "logit_bias", "invalid_request"),
    ({"messages": HI, "logit_bias": [1]}, "logit_bias", "invalid_request"),
    ({"messages": HI, "response_format": {"type": "xml"}}, "response_format", "unsupported_parameter"),
    ({"messages": HI, "response_format": {"type": "json_schema"}}, "response_format", "invalid_request"),
    ({"messages": HI, "response_format": "json"}, "response_format", "invalid_request"),
    ({"messages": HI, "tool_choice": "required"}, "tool_choice", "invalid_request"),
    ({"messages": HI, "tool_choice": "whatever"}, "tool_choice", "unsupported_parameter"),
    ({"messages": HI, "tools": "x"}, "tools", "invalid_request"),
    ({"messages": HI, "temperature": -1}, "temperature", "invalid_request"),
    ({"messages": HI, "temperature": "hot"}, "temperature", "invalid_request"),
    ({"messages": HI, "temperature": True}, "temperature", "invalid_request"),
    ({"messages": HI, "max_tokens": 0}, "max_tokens", "invalid_request"),
    ({"messages": HI, "max_tokens": 1.5}, "max_tokens", "invalid_request"),
    (b'{"prompt": "x", "top_p": NaN}', "top_p", "invalid_request"),
    ({"messages": HI, "thinking": "maybe"}, "thinking", "invalid_request"),
    ({"url": COMPLETIONS, "body": {"prompt": ["a", "b"]}}, "prompt", "invalid_request"),
    ({"url": COMPLETIONS, "body": {}}, "prompt", "invalid_request"),
    ({"url": COMPLETIONS, "body": {"prompt": ""}}, "prompt", "invalid_request"),
    ({"url": COMPLETIONS, "body": {"prompt": [-1]}}, "prompt", "invalid_request"),
])  # fmt: skip
def test_refusals_name_what_is_wrong(one: Any, param: str | None, code: str) -> None:
    why = refusal(one)
    assert (why.param, why.code) == (param, code)


def test_a_bad_line_does_not_touch_the_others() -> None:
    found = lines({"prompt": "x"}, b"{\n", {"custom_id": "z", "prompt": "y", "n": 3}, {"prompt": "y"})
    assert [line.number for line in found.good] == [1, 4]
    assert list(described(found.bad))[1].startswith("line 3 (z): n: One answer per request is made here.")
    assert list(found.digests) == ["line-1", "line-4", "line-2", "z"]


@pytest.mark.parametrize("extra, thinking", [
    ({}, None),
    ({"chat_template_kwargs": {"thinking": False}}, False),
    ({"thinking": {"type": "disabled"}}, False),
    ({"thinking": {"type": "enabled", "keep": "all"}}, True),
    ({"reasoning_effort": "none"}, False),
    ({"reasoning_effort": "high"}, True),
    ({"enable_thinking": False}, False),
])  # fmt: skip
def test_the_thinking_switch_in_its_spellings(extra: dict[str, Any], thinking: bool | None) -> None:
    assert only({"messages": HI, **extra}).asked.thinking is thinking


def test_what_asks_for_nothing_is_accepted() -> None:
    harmless = {"n": 1, "stop": None, "logprobs": False, "presence_penalty": 0.0, "response_format": {"type": "text"}}
    unknown = {"store": True, "metadata": {"a": 1}, "user": "x", "service_tier": "flex", "invented": 3, "model": "any"}
    line = only({"messages": HI, **harmless, **unknown, "max_completion_tokens": 7, "seed": -1, "top_k": 3})
    assert line.asked.sampling == {"max_tokens": 7, "seed": (1 << 63) - 1, "top_k": 3, "presence_penalty": 0.0}
    assert line.asked.grammar is None
    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    parts = only({"messages": [{"role": "developer", "content": texts}], "tools": [{"x": 1}], "tool_choice": "none"})
    assert (parts.asked.messages[0].role, parts.asked.messages[0].content, parts.asked.tools) == ("system", "ab", ())


def test_what_is_asked_of_sampling_and_form() -> None:
    sampling = {"stop": ["a", ""], "logit_bias": {"7": -1.5}, "frequency_penalty": 1}
    told = {"logprobs": True, "top_logprobs": 2}
    line = only({"messages": HI, **sampling, **told, "response_format": {"type": "json_object"}})
    assert line.asked.sampling == {"stop": ("a",), "logit_bias": ((7, -1.5),), "frequency_penalty": 1, "logprobs": 2}
    assert line.asked.grammar is not None and "%json" in line.asked.grammar
    text = only({"url": COMPLETIONS, "body": {"prompt": "x", "logprobs": 3, "stop": "b"}})
    assert text.asked.sampling == {"stop": ("b",), "logprobs": 3}
    assert only({"messages": HI, "logprobs": True}).asked.sampling == {"logprobs": 0}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    called = only({"messages": HI, "tools": [tool], "tool_choice": "required"})
    assert called.asked.tools == (tool,) and "functions.f" in str(called.asked.grammar)


def test_digests_tell_what_is_asked_and_nothing_else() -> None:
    def digest(one: dict[str, Any], **more: Any) -> str:
        return only(one, **more).digest

    same = digest({"custom_id": "a", "messages": HI, "n": 1})
    assert digest({"n": 1, "messages": HI}) == same
    assert digest({"messages": HI}) != same
    assert digest({"prompt": "x"}, system="a") != digest({"prompt": "x"}, system="b")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ("custom_id", "url", "method", "body", "messages", "prompt", "tools", "thinking", "seed", "top_k", "n", "stop")
    + ("logit_bias", "logprobs", "top_logprobs", "response_format", "tool_choice", "presence_penalty")
)


@given(st.dictionaries(FIELDS, VALUES, max_size=4))
def test_any_json_is_a_line_or_a_refusal(fields: dict[str, Any]) -> None:
    found = lines(fields)
    assert len(found.good) + len(found.bad) == 1
    assert all(isinstance(each, Bad) and str(each.why) for each in found.bad)


@given(st.dictionaries(FIELDS, VALUES, max_size=4))
def test_any_body_is_read_or_refused(body: dict[str, Any]) -> None:
    for url in (CHAT, COMPLETIONS):
        try:
            read_body(url, {"messages": HI, "prompt": "x", **body})
        except Refused as why:
            assert why.code
