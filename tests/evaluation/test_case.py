from dataclasses import replace

import pytest

from hybrid.chat.message import Message, ToolCall
from hybrid.chat.template import DEFAULT_TEMPLATE, ChatTemplate
from hybrid.chat.tokenizer import KIMI_SPECIALS, Tokenizer
from hybrid.evaluation.case import Case, check, prompt_ids, reply_ids

BYTES = [bytes([byte]) for byte in range(256)]
TOKENIZER = Tokenizer(BYTES, {256 + offset: name for offset, name in KIMI_SPECIALS.items()})
TEMPLATE = ChatTemplate(DEFAULT_TEMPLATE)
QUESTION = (Message("user", "What is 1 + 1?"),)
SUM = Case("arithmetic", QUESTION, (), True, Message("assistant", "2", "1+1=2"))
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


def call(name: str, arguments: str, index: int = 0) -> ToolCall:
    return ToolCall(f"functions.{name}:{index}", name, arguments)


TIME, ALARM = call("get_time", '{"city": "Rome"}'), call("set_alarm", '{"hour": 7, "days": ["Monday"]}', 1)
BOTH = Case("tool_multi", QUESTION, (TOOL,), False, Message("assistant", "", None, (TIME, ALARM)))
NONE = Case("tool_refusal", QUESTION, (TOOL,), False, Message("assistant", "I have no tool for that."), exact=False)


@pytest.mark.parametrize("case", [SUM, BOTH, NONE])
def test_the_answer_is_right_with_any_reasoning(case: Case) -> None:
    assert check(case, case.answer)
    assert check(case, replace(case.answer, reasoning_content="Something else."))


def test_words_are_compared_without_the_blanks_around_them() -> None:
    assert check(SUM, Message("assistant", " 2\n"))
    for wrong in ("3", "22", "2.", "1 + 1 = 2", ""):
        assert not check(SUM, Message("assistant", wrong))


def test_an_answer_calls_no_tool() -> None:
    assert not check(SUM, Message("assistant", "2", None, (TIME,)))
    assert not check(NONE, Message("assistant", "", None, (TIME,)))


def test_a_refusal_may_use_other_words_but_must_say_something() -> None:
    assert check(NONE, Message("assistant", "I'm afraid I can't."))
    assert not check(NONE, Message("assistant", " "))


def test_arguments_are_compared_as_values() -> None:
    other = (call("get_time", '{ "city":"Rome" }', 5), call("set_alarm", '{"days":["Monday"],"hour":7}', 9))
    assert check(BOTH, Message("assistant", "I will do both.", None, other))


@pytest.mark.parametrize(
    "calls",
    [
        (),
        (TIME,),
        (ALARM, TIME),
        (TIME, ALARM, ALARM),
        (TIME, call("set_alarm", '{"hour": "7", "days": ["Monday"]}')),
        (TIME, call("set_alarm", '{"hour": 7}')),
        (TIME, call("set_timer", ALARM.arguments)),
        (TIME, call("set_alarm", '{"hour": 7, "days": ["Monday"')),
    ],
)
def test_near_misses_among_calls(calls: tuple[ToolCall, ...]) -> None:
    assert not check(BOTH, Message("assistant", "", None, calls))


def test_the_split_depends_on_the_prompt_alone() -> None:
    assert SUM.split == replace(SUM, answer=Message("assistant", "3"), thinking=False).split
    asked = [replace(SUM, messages=(Message("user", f"What is {i} + 1?"),)) for i in range(400)]
    assert 20 < sum(case.split == "test" for case in asked) < 80
    assert len({replace(case, key="1+1").split for case in asked}) == 1


def test_what_the_model_reads_and_has_to_write() -> None:
    prompt, reply = (TOKENIZER.decode(ids(SUM, TEMPLATE, TOKENIZER), False) for ids in (prompt_ids, reply_ids))
    assert prompt == "<|im_user|>user<|im_middle|>What is 1 + 1?<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
    assert reply == "1+1=2</think>2<|im_end|>"


def test_without_thinking_the_prompt_closes_the_reasoning() -> None:
    prompt, reply = (TOKENIZER.decode(ids(BOTH, TEMPLATE, TOKENIZER), False) for ids in (prompt_ids, reply_ids))
    assert prompt.endswith("assistant<|im_middle|><think></think>")
    assert reply == (
        "<|tool_calls_section_begin|>"
        f"<|tool_call_begin|>functions.get_time:0<|tool_call_argument_begin|>{TIME.arguments}<|tool_call_end|>"
        f"<|tool_call_begin|>functions.set_alarm:1<|tool_call_argument_begin|>{ALARM.arguments}<|tool_call_end|>"
        "<|tool_calls_section_end|><|im_end|>"
    )
