"""Prompts: the documented examples to the byte and to the id, the history rule, and foreign tool-call ids."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid.chat.message import Message, ToolCall
from hybrid.chat.template import DEFAULT_SYSTEM, DEFAULT_TEMPLATE, ChatTemplate
from hybrid.chat.tokenizer import Tokenizer
from hybrid.errors import CheckpointError, KimiError

SYSTEM = {"role": "system", "content": DEFAULT_SYSTEM}
WHO = {"role": "user", "content": "hi, who are you?"}
ASK = "<|im_assistant|>assistant<|im_middle|>"

A_TEXT = (
    "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
    "<|im_user|>user<|im_middle|>hi, who are you?<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
)
A_IDS = [163594, 14062, 163601, 3900, 554, 24980, 72, 11, 519, 22572, 26626, 5232, 673, 30218, 10065, 22572, 13, 163586,
         163587, 2482, 163601, 9663, 11, 1364, 554, 398, 30, 163586, 163588, 69702, 163601, 163606]  # fmt: skip
B_TEXT = "<|im_user|>user<|im_middle|>hi, who are you?<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>"
SUM_IDS = [163587, 2482, 163601, 5376, 387, 220, 16, 10, 16, 30, 163586, 163588, 69702, 163601, 163606]

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get weather information.",
            "parameters": {
                "type": "object",
                "required": ["city"],
                "properties": {
                    "city": {"type": "string", "description": "City name"},
                    "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 7},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}},
]
DECLARED = """# Tools

## functions
namespace functions {
// Get weather information.
type get_weather = (_: {
  // City name
  city: string,
  // maximum: 7, minimum: 1
  days?: number,
  // Default: "c"
  unit?: "c" | "f"
}) => any;
type ping = (_: {}) => any;
}
"""


def call(call_id: str, arguments: Any, name: str = "get_weather") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def weather_loop() -> list[dict[str, Any]]:
    """A turn in the middle of its tool calls; the second result lacks a name."""
    return [
        {"role": "user", "content": "Weather in Beijing and Paris?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Need the tool.",
            "tool_calls": [
                call("functions.get_weather:0", '{"city": "Beijing"}'),
                call("functions.get_weather:1", {"city": "Paris"}),
            ],
        },
        {
            "role": "tool",
            "name": "get_weather",
            "tool_call_id": "functions.get_weather:0",
            "content": '{"weather": "Sunny"}',
        },
        {"role": "tool", "tool_call_id": "functions.get_weather:1", "content": '{"weather": "Rain"}'},
    ]


LOOP_HEAD = f"<|im_system|>tool_declare<|im_middle|>{DECLARED}<|im_end|>"
LOOP_BODY = (
    "<|im_user|>user<|im_middle|>Weather in Beijing and Paris?<|im_end|>"
    f"{ASK}<think>%s</think><|tool_calls_section_begin|>"
    '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Beijing"}<|tool_call_end|>'
    '<|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>'
    "<|tool_calls_section_end|><|im_end|>"
    '<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\n{"weather": "Sunny"}<|im_end|>'
    '<|im_system|>tool<|im_middle|>## Return of functions.get_weather:1\n{"weather": "Rain"}<|im_end|>'
)
C_TEXT = f"{LOOP_HEAD}{LOOP_BODY % 'Need the tool.'}{ASK}<think>"
D_TEXT = (
    f"{LOOP_HEAD}{LOOP_BODY % ''}{ASK}<think></think>Beijing sunny, Paris rain.<|im_end|>"
    f"<|im_user|>user<|im_middle|>Thanks!<|im_end|>{ASK}<think>"
)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(DEFAULT_TEMPLATE)


def after_the_answer() -> list[dict[str, Any]]:
    answer = {"role": "assistant", "content": "Beijing sunny, Paris rain.", "reasoning_content": "Two results."}
    return [*weather_loop(), answer, {"role": "user", "content": "Thanks!"}]


def test_example_a_thinking(template: ChatTemplate, real: Tokenizer) -> None:
    assert template.render([SYSTEM, WHO]) == A_TEXT
    assert template.render_ids([SYSTEM, WHO], real) == A_IDS
    assert template.render_ids([{"role": "user", "content": "What is 1+1?"}], real) == SUM_IDS


def test_example_b_instant(template: ChatTemplate, real: Tokenizer) -> None:
    assert template.render([WHO], thinking=False) == B_TEXT
    ids = template.render_ids([WHO], real, thinking=False)
    assert len(ids) == 15
    assert ids == [*A_IDS[A_IDS.index(163587) :], 163607]


def test_example_c_in_the_tool_loop(template: ChatTemplate, real: Tokenizer) -> None:
    assert template.render(weather_loop(), tools=TOOLS) == C_TEXT
    ids = template.render_ids(weather_loop(), real, tools=TOOLS)
    assert len(ids) == 186
    assert ids == real.encode_prompt(C_TEXT)
    assert real.decode(ids, skip_special=False) == C_TEXT


def test_example_d_after_the_answer(template: ChatTemplate, real: Tokenizer) -> None:
    assert template.render(after_the_answer(), tools=TOOLS) == D_TEXT
    assert template.render_ids(after_the_answer(), real, tools=TOOLS) == real.encode_prompt(D_TEXT)


def test_example_e_an_image(template: ChatTemplate, real: Tokenizer) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": "Describe."}]
    ids = template.render_ids([{"role": "user", "content": parts}], real, media_tokens=[3])
    image = [163602, 4017, 163603, 163605, 163605, 163605, 163604, 198]
    assert ids == [163587, 2482, 163601, *image, *real.encode("Describe."), 163586, 163588, 69702, 163601, 163606]


def test_example_f_a_video_chunk(real: Tokenizer) -> None:
    text = "00:00:02.000<|media_begin|>video<|media_content|>" + "<|media_pad|>" * 2 + "<|media_end|>"
    head = [465, 25, 465, 25, 4312, 13, 1476, 163602, 22782, 163603]
    assert real.encode_prompt(text) == [*head, 163605, 163605, 163604]


def test_the_examples_need_no_real_vocabulary(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    for messages, tools, text in ((weather_loop(), TOOLS, C_TEXT), (after_the_answer(), TOOLS, D_TEXT)):
        ids = template.render_ids(messages, tokenizer, tools=tools)
        assert ids == tokenizer.encode_prompt(text)


def test_instant_drops_all_reasoning(template: ChatTemplate) -> None:
    text = template.render(weather_loop(), tools=TOOLS, thinking=False)
    assert text == f"{LOOP_HEAD}{LOOP_BODY % ''}{ASK}<think></think>"


def test_without_a_generation_prompt(template: ChatTemplate) -> None:
    assert template.render([WHO], add_generation_prompt=False) + f"{ASK}<think>" == template.render([WHO])
    assert template.render([], add_generation_prompt=False) == ""


def test_names_and_other_roles(template: ChatTemplate) -> None:
    messages = [{"role": "user", "name": "ann", "content": "a"}, {"role": "critic", "content": "b"}]
    text = "<|im_user|>ann<|im_middle|>a<|im_end|><|im_system|>critic<|im_middle|>b<|im_end|>"
    assert template.render(messages, add_generation_prompt=False) == text


@pytest.mark.parametrize("key", ["reasoning_content", "tool_calls", "name", "tool_call_id"])
def test_nulls_are_as_good_as_missing(template: ChatTemplate, key: str) -> None:
    answer: dict[str, Any] = {"role": "assistant", "content": "hi", "tool_calls": [call("functions.f:0", "{}", "f")]}
    without = {k: v for k, v in answer.items() if k != key}
    assert template.render([WHO, {**without, key: None}]) == template.render([WHO, without])
    assert "None" not in template.render([WHO, {"role": "assistant", "content": None}, {"role": "tool", key: None}])


def test_an_empty_list_of_calls_is_an_answer(template: ChatTemplate) -> None:
    answer = {"role": "assistant", "content": "hi", "reasoning_content": "hm", "tool_calls": []}
    assert f"{ASK}<think></think>hi<|im_end|>" in template.render([WHO, answer])


def test_messages_and_dicts_render_alike(template: ChatTemplate) -> None:
    messages = [Message.from_dict(message) for message in after_the_answer()]
    assert template.render(messages, tools=TOOLS) == D_TEXT
    assert [Message.from_dict(message.to_dict()) for message in messages] == messages


def results(*ids: str | None) -> list[dict[str, Any]]:
    return [{"role": "tool", "content": f"result {n}", "tool_call_id": i} for n, i in enumerate(ids)]


def calls(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [call(i, "{}", name) for i, name in pairs]}


def ids_in(template: ChatTemplate, messages: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The ids of calls and of results in a rendering, in order."""
    text = template.render(messages, add_generation_prompt=False)
    called = [piece.split("<")[0] for piece in text.split("<|tool_call_begin|>")[1:]]
    answered = [piece.split("\n")[0] for piece in text.split("## Return of ")[1:]]
    return called, answered


@pytest.mark.parametrize(
    ("messages", "called", "answered"),
    [
        # foreign ids: numbered through, results in any order
        (
            [calls(("call_a", "f"), ("call_b", "g.h")), *results("call_b", "call_a"), calls(("x", "f")), *results("x")],
            ["functions.f:0", "functions.g.h:1", "functions.f:2"],
            ["functions.g.h:1", "functions.f:0", "functions.f:2"],
        ),
        # native ids stay as they are, whatever their numbers
        (
            [calls(("functions.f:3", "f"), ("functions.f:7", "f")), *results("functions.f:7", "functions.f:3")],
            ["functions.f:3", "functions.f:7"],
            ["functions.f:7", "functions.f:3"],
        ),
        # native but used twice: numbered through, each result to the latest call of that id
        (
            [calls(("functions.f:0", "f")), *results("functions.f:0")] * 2,
            ["functions.f:0", "functions.f:1"],
            ["functions.f:0", "functions.f:1"],
        ),
        # native form with another function's name
        ([calls(("functions.f:0", "g")), *results("functions.f:0")], ["functions.g:0"], ["functions.g:0"]),
        # one foreign id among native ones
        (
            [calls(("functions.f:0", "f"), ("toolu_1", "f")), *results("functions.f:0", "toolu_1")],
            ["functions.f:0", "functions.f:1"],
            ["functions.f:0", "functions.f:1"],
        ),
        # equal or missing ids: in order
        (
            [calls(("", "f"), ("", "g")), *results(None, "")],
            ["functions.f:0", "functions.g:1"],
            ["functions.f:0", "functions.g:1"],
        ),
        # two results for one call, and a native one for a call that is no longer there
        (
            [calls(("a", "f"), ("b", "f")), *results("a", "a", "functions.f:9", "b")],
            ["functions.f:0", "functions.f:1"],
            ["functions.f:0", "functions.f:0", "functions.f:9", "functions.f:1"],
        ),
        (results("lost"), [], ["lost"]),
    ],
)
def test_tool_call_ids(
    template: ChatTemplate, messages: list[dict[str, Any]], called: list[str], answered: list[str]
) -> None:
    before = json.dumps(messages)
    assert ids_in(template, messages) == (called, answered)
    assert json.dumps(messages) == before, "the caller's messages are left alone"


def test_calls_without_arguments_have_none(template: ChatTemplate) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    assert "<|tool_call_argument_begin|>{}<|tool_call_end|>" in template.render([message])
    assert Message.from_dict(message).tool_calls == (ToolCall("", "f", "{}"),)


def test_tools_in_json_when_typescript_cannot_say_it(template: ChatTemplate) -> None:
    tools = [{"type": "function", "function": {"name": "é", "parameters": {"properties": {"x": {"oneOf": []}}}}}]
    text = '[{"function":{"name":"é","parameters":{"properties":{"x":{"oneOf":[]}}}},"type":"function"}]'
    assert template.render([], tools=tools).startswith(f"<|im_system|>tool_declare<|im_middle|>{text}<|im_end|>")


def test_a_template_that_knows_only_tools(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{% if tools %}{% for tool in tools %}{{ tool.function.name }};{% endfor %}{% endif %}")
    assert template.render([WHO], tools=TOOLS) == "get_weather;ping;"
    assert tokenizer.decode(template.render_ids([WHO], tokenizer, tools=TOOLS)) == "get_weather;ping;"
    assert template.render([WHO]) == ""


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"content": "x"}], "role"),
        ([{"role": 5, "content": "x"}], "role"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "names no function"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "names no function"),
        ([{"role": "user", "content": [{"type": "image"}]}], "1 images, but 0"),
        ([{"role": "user", "content": [{"type": "video_url"}]}], "Video"),
    ],
)
def test_malformed_messages_are_refused(
    template: ChatTemplate, tokenizer: Tokenizer, messages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(KimiError, match=message) as error:
        template.render_ids(messages, tokenizer)
    assert error.value.exit_code == 1


def test_bottomless_arguments_are_refused(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    deep: Any = 1
    for _ in range(5_000):
        deep = [deep]
    with pytest.raises(KimiError, match="deeper"):
        template.render_ids([{"role": "assistant", "tool_calls": [call("a", {"x": deep})]}], tokenizer)


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    assert ChatTemplate.from_directory(tmp_path).source == DEFAULT_TEMPLATE
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ bos_token }}d"}]
    config = {"chat_template": named, "bos_token": {"content": "[BOS]"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_directory(tmp_path).render([]) == "[BOS]d"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ eos_token }}c"}))
    assert ChatTemplate.from_directory(tmp_path).render([]) == "c"
    (tmp_path / "chat_template.jinja").write_text("own")
    assert ChatTemplate.from_directory(tmp_path).render([]) == "own"


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="chat_template.jinja"):
        ChatTemplate.from_directory(tmp_path)
