"""/v1/chat/completions as OpenAI's own client sees it."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from openai import APIError, BadRequestError, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from hybrid.kimi import Kimi

PATH = "/v1/chat/completions"
LOOK = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
CALLS = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
    '{"at": "the sky"}<|tool_call_end|><|tool_call_begin|>functions.look:1<|tool_call_argument_begin|> '
    "<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
)


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "any", "messages": [{"role": "user", "content": text}], "max_tokens": 8, **more}


def post(client: httpx2.Client, body: dict[str, Any]) -> dict[str, Any]:
    """The answer, after OpenAI's types have accepted it."""
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate_json(response.content, strict=True)
    return response.json()


def events(client: httpx2.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, each accepted by OpenAI's types."""
    response = client.post(PATH, json=body | {"stream": True})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    for line in lines:
        ChatCompletionChunk.model_validate_json(line, strict=True)
    return [json.loads(line) for line in lines]


def deltas(chunks: list[dict[str, Any]], field: str) -> list[Any]:
    found = [choice["delta"].get(field) for chunk in chunks for choice in chunk["choices"]]
    return [value for value in found if value]


def test_an_answer_with_reasoning(client: httpx2.Client) -> None:
    body = post(client, ask("say:why not</think> Hello!<|im_end|>", max_tokens=100))
    choice = body["choices"][0]
    assert choice["message"]["reasoning_content"] == "why not" and choice["message"]["content"] == "Hello!"
    assert choice["finish_reason"] == "stop" and body["thinking"] is True
    usage = body["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert body["timings"]["predicted_n"] == usage["completion_tokens"]


def test_a_stream_says_what_the_whole_answer_says(client: httpx2.Client) -> None:
    body = ask("tell me more", temperature=0, max_tokens=24)
    whole = post(client, body)
    chunks = events(client, body | {"stream_options": {"include_usage": True}})
    message = whole["choices"][0]["message"]
    assert "".join(deltas(chunks, "reasoning_content")) == message.get("reasoning_content", "")
    assert "".join(deltas(chunks, "content")) == message["content"]
    *_, last, figures = chunks
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert figures["choices"] == [] and figures["usage"]["completion_tokens"] == 24
    assert figures["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


def test_the_sdk_streams(openai: OpenAI) -> None:
    with openai.chat.completions.stream(**ask("say:hm</think>Hi there<|im_end|>", max_tokens=50)) as stream:
        final = [event for event in stream][-1] and stream.get_final_completion()
    assert final.choices[0].message.content == "Hi there" and final.choices[0].finish_reason == "stop"


def test_tool_calls(client: httpx2.Client) -> None:
    body = ask(f"say:</think>Let me see.{CALLS}", tools=[LOOK], max_tokens=400)
    choice = post(client, body)["choices"][0]
    expected = [("functions.look:0", '{"at": "the sky"}'), ("functions.look:1", "{}")]
    calls = choice["message"]["tool_calls"]
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == expected
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
    chunks = events(client, body)
    pieces = [piece for delta in deltas(chunks, "tool_calls") for piece in delta]
    assert len(pieces) > 4, "the arguments come as they are written"
    for index, (call_id, arguments) in enumerate(expected):
        own = [piece for piece in pieces if piece["index"] == index]
        assert own[0]["id"] == call_id and own[0]["function"]["name"] == "look" and own[0]["type"] == "function"
        assert "".join(piece["function"]["arguments"] for piece in own) == arguments
        assert not any("id" in piece for piece in own[1:])
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_off(client: httpx2.Client) -> None:
    script = f"say:</think>{CALLS.partition(' sky')[0]}<|im_end|>"
    whole, chunks = post(client, ask(script, max_tokens=400)), events(client, ask(script, max_tokens=400))
    assert whole["choices"][0]["message"]["content"] == 'functions.look:0 {"at": "the'
    assert not deltas(chunks, "content") and chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_foreign_ids_of_calls_are_rewritten(client: httpx2.Client) -> None:
    call = {"id": "call_x7f", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_x7f", "content": "blue"},
    ]
    ids = client.post("/tokenize", json={"messages": history}).json()["tokens"]
    text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert "call_x7f" not in text and "## Return of functions.look:0" in text
    script = {"role": "user", "content": f"say:</think>{CALLS.replace('look:0', 'look:5')}"}
    calls = post(client, ask("", messages=[*history, script], max_tokens=400))["choices"][0]["message"]["tool_calls"]
    assert len({call["id"] for call in calls}) == 2 and calls[0]["id"] == "functions.look:5"


@pytest.mark.parametrize(
    ("switch", "thinking"),
    [
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"thinking": {"type": "disabled", "keep": "all"}}, False),
        ({"enable_thinking": False}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"thinking": {"type": "enabled"}, "enable_thinking": False}, True),
        ({}, True),
    ],
)
def test_the_thinking_switch(client: httpx2.Client, switch: dict[str, Any], thinking: bool) -> None:
    body = post(client, ask("say:one</think>two<|im_end|>", max_tokens=30, **switch))
    assert body["thinking"] is thinking
    assert ("reasoning_content" in body["choices"][0]["message"]) is thinking


def test_a_thinking_budget(kimi: Kimi, client: httpx2.Client) -> None:
    never_again = {str(kimi.tokenizer.specials["<think>"]): -100}  # a random model may draw it in its answer, too
    usage = post(client, ask("hello", max_tokens=40, thinking_budget=5, logit_bias=never_again))["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] <= 6


def test_stop_strings(client: httpx2.Client) -> None:
    script = "say:</think>one two three<|im_end|>"
    choice = post(client, ask(script, max_tokens=60, stop=[" thr", "", "never"]))["choices"][0]
    assert choice["message"]["content"] == "one two" and choice["finish_reason"] == "stop"
    assert "".join(deltas(events(client, ask(script, max_tokens=60, stop="two")), "content")) == "one "


def test_likelihoods(client: httpx2.Client) -> None:
    body = ask("hello", temperature=0, max_tokens=6, logprobs=True, top_logprobs=2)
    content = post(client, body)["choices"][0]["logprobs"]["content"]
    assert len(content) == 6
    for each in content:
        assert len(each["top_logprobs"]) == 2 and each["logprob"] == each["top_logprobs"][0]["logprob"] <= 0
    told = [choice["logprobs"]["content"] for chunk in events(client, body) for choice in chunk["choices"]]
    assert [each["bytes"] for piece in told for each in piece] == [each["bytes"] for each in content]
    assert post(client, body | {"logprobs": False})["choices"][0]["logprobs"] is None


def test_penalties_and_biases_reach_the_sampler(client: httpx2.Client, kimi: Kimi) -> None:
    (token,) = kimi.tokenizer.encode("z")
    body = ask("hello", temperature=0, max_tokens=4, logit_bias={str(token): 100}, enable_thinking=False)
    assert post(client, body)["choices"][0]["message"]["content"] == "zzzz"
    assert post(client, body | {"frequency_penalty": 2, "presence_penalty": 2})["choices"]


def test_progress_and_signs_of_life(client: httpx2.Client) -> None:
    body = ask("slow: " + "word " * 60, stream=True, return_progress=True)
    text = client.post(PATH, json=body).text
    assert ": keep-alive\n\n" in text
    found = [json.loads(line[6:]) for line in text.splitlines() if '"prompt_progress"' in line]
    last = found[-1]["prompt_progress"]
    assert set(last) == {"total", "cache", "processed", "time_ms"} and last["processed"] == last["total"] > 60
    assert "prompt_progress" not in client.post(PATH, json=body | {"return_progress": False}).text


def test_unknown_fields_and_what_history_lacks(client: httpx2.Client) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}], "whatever": 1},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello", "reasoning": "a greeting"},
        {"role": "user", "content": "and now?"},
    ]
    extra = {"prompt_cache_key": "k", "store": True, "metadata": {}, "user": "u", "parallel_tool_calls": True}
    post(client, ask("", messages=messages, service_tier="auto", seed=-1, top_k=5, min_p=0.01, **extra))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}, {"content": "x"}]}, "messages.1.role"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "messages[0]"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"functions": [{}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_what_is_wrong_is_named(client: httpx2.Client, change: dict[str, Any], param: str) -> None:
    response = client.post(PATH, json=ask("hi") | change)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://example.org/cat.png", "not fetched"),
        ("http://169.254.169.254/", "not fetched"),
        ("FILE:///etc/passwd", "not read because"),
        ("data:image/png;base64,AAAA", "Only text"),
    ],
)
def test_pictures_are_refused_by_name(client: httpx2.Client, url: str, why: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    response = client.post(PATH, json=ask("") | {"messages": [{"role": "user", "content": [part]}]})
    error = response.json()["error"]
    assert response.status_code == 400 and why in error["message"] and error["code"] == "unsupported_image_url"


def test_a_prompt_that_is_too_long_is_refused_with_numbers(openai: OpenAI) -> None:
    for stream in (True, False):
        with pytest.raises(BadRequestError, match="2,048") as caught:
            openai.chat.completions.create(**ask("word " * 3000), stream=stream)
        assert caught.value.code == "context_length_exceeded"


def test_errors_in_the_middle(client: httpx2.Client, openai: OpenAI) -> None:
    response = client.post(PATH, json=ask("fail: now", max_tokens=30))
    assert response.status_code == 500 and "not numbers" in response.json()["error"]["message"]
    with pytest.raises(APIError, match="not numbers"):
        list(openai.chat.completions.create(**ask("fail: now", max_tokens=30), stream=True))
