"""Every answer is found again by a slow reader who knows the wording only, and every document by the reply parser."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.chat.message import Message
from hybrid.chat.parser import ReplyParser
from hybrid.chat.template import DEFAULT_TEMPLATE, ChatTemplate
from hybrid.chat.tokenizer import KIMI_SPECIALS, Tokenizer
from hybrid.evaluation import words
from hybrid.evaluation.arithmetic import add, multiply, subtract
from hybrid.evaluation.case import Case, check, prompt_ids, reply_ids
from hybrid.evaluation.catalogue import TOOLS
from hybrid.evaluation.skills import SKILLS, cases

BYTES = [bytes([byte]) for byte in range(256)]
TOKENIZER = Tokenizer(BYTES, {256 + offset: name for offset, name in KIMI_SPECIALS.items()})
TEMPLATE = ChatTemplate(DEFAULT_TEMPLATE)
MANY = 300

FACTS = {
    "pet": (r"(\w+)'s (\w+) is called (\w+)\.", r"(\w+) has a (\w+) called (\w+)\."),
    "city": (r"(\w+) lives in (\w+)\.", r"(\w+) has a house in (\w+)\."),
    "job": (r"(\w+) works as a (\w+)\.", r"(\w+) is a (\w+)\."),
    "colour": (r"(\w+)'s favourite colour is (\w+)\.", r"(\w+) likes the colour (\w+)\."),
    "thing": (r"(\w+) bought a (\w+)\.", r"(\w+) has a new (\w+)\."),
    "age": (r"(\w+) is (\w+) years old\.", r"(\w+)'s age is (\w+)\."),
}
QUESTIONS = {
    "pet": (r"What is (\w+)'s (\w+) called\?", r"What is the name of (\w+)'s (\w+)\?"),
    "city": (r"Where does (\w+) live\?", r"In which city does (\w+) live\?"),
    "job": (r"What does (\w+) do for a living\?", r"What is (\w+)'s job\?"),
    "colour": (r"What is (\w+)'s favourite colour\?", r"Which colour does (\w+) like\?"),
    "thing": (r"What did (\w+) buy\?", r"What is it that (\w+) bought\?"),
    "age": (r"How old is (\w+)\?", r"What is (\w+)'s age\?"),
}
PEOPLE = {
    "pet": r"Whose (\w+) is called (\w+)\?",
    "city": r"Who lives in (\w+)\?",
    "job": r"Who is a (\w+)\?",
    "colour": r"Who likes the colour (\w+)\?",
    "thing": r"Who bought a (\w+)\?",
    "age": r"Who is (\w+) years old\?",
}


def solve_arithmetic(text: str, _: Any) -> str:
    a, b = map(int, re.findall(r"\d+", text))
    if "Subtract" in text:
        return str(b - a)
    if "*" in text or "times" in text:
        return str(sum([a] * b))
    return str(a - b) if "-" in text or "minus" in text else str(a + b)


def solve_copy(text: str, _: Any) -> str:
    return text.split("\n", 1)[1]


def solve_count(text: str, _: Any) -> str:
    head, items = text.split("\nList: ")
    (word,) = re.findall(r"(?:is|does|Count) (\w+) ", head)
    return str(sum(item == word for item in items.split(" ")))


def solve_sort(text: str, _: Any) -> str:
    head, items = text.split("\n")
    left, order = items.split(" "), []
    assert ("mallest" in head or "small" in head) == left[0].isdigit()
    while left:
        order.append(min(left, key=lambda item: (len(item), item) if item.isdigit() else item))
        left.remove(order[-1])
    return " ".join(order)


def solve_lookup(text: str, _: Any) -> str:
    question, told = text.split("\nText: ")
    found = []
    for kind, patterns in FACTS.items():
        rows = [match.groups() for sentence in patterns for match in re.finditer(rf"\b{sentence}", told)]
        for asked in QUESTIONS[kind]:
            if match := re.match(asked, question):
                found += [row[-1] for row in rows if row[:-1] == match.groups()]
        if match := re.match(PEOPLE[kind], question):
            found += [row[0] for row in rows if row[1:] == match.groups()]
    (answer,) = set(found)
    return answer


def meanings(sentence: str, name: str) -> list[dict[str, str]]:
    """The arguments that a sentence gives, as a call of the tool `name`."""
    asks = [ask for tool in TOOLS if tool.name == name for ask in tool.asks]
    if not asks:
        verb, thing = name.split("_")
        head = f"(?:Please|Can you) {verb} the {thing} "
        asks = [head + "of {owner}", head + "number {number}"]
        patterns = [re.sub(r"\{(\w+)\}", r"(?P<\1>\\w+)", ask) + r"[.?]" for ask in asks]
    else:
        patterns = [re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[\\w ]+)", re.escape(ask)) for ask in asks]
    return [match.groupdict() for pattern in patterns if (match := re.fullmatch(pattern, sentence))]


def solve_tools(text: str, tools: list[dict[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """The call that each sentence asks for; a sentence that fits no tool gives none."""
    calls = []
    for sentence in re.findall(r'[^.?]+[.?]"?[.?]?', text):
        fits = []
        for function in (tool["function"] for tool in tools):
            names = set(function["parameters"]["properties"])
            found = [values for values in meanings(sentence.strip(), function["name"]) if set(values) == names]
            fits += [(function["name"], values) for values in found]
        assert len(fits) <= 1, f"{sentence} can be meant in several ways: {fits}"
        calls += fits
    return calls


SOLVERS: dict[str, Callable[[str, Any], str]] = {
    "arithmetic": solve_arithmetic,
    "arithmetic_instant": solve_arithmetic,
    "copy": solve_copy,
    "count": solve_count,
    "sort": solve_sort,
    "lookup": solve_lookup,
}


@pytest.mark.parametrize("skill", SKILLS)
def test_every_answer_follows_from_the_prompt(skill: str) -> None:
    for case in cases(skill, "test", 0, MANY):
        (message,) = case.messages
        if skill in SOLVERS:
            assert case.answer.content == SOLVERS[skill](message.content, None), message.content
        else:
            said = [(c.name, {k: str(v) for k, v in json.loads(c.arguments).items()}) for c in case.answer.tool_calls]
            assert said == solve_tools(message.content, list(case.tools)), message.content
            assert len(said) == {"tool_call": 1, "tool_multi": 2, "tool_refusal": 0}[skill]


@pytest.mark.parametrize("skill", SKILLS)
def test_the_splits_share_nothing(skill: str) -> None:
    def seen(split: Any) -> set[str]:
        return {case.key or repr((case.messages, case.tools)) for case in cases(skill, split, 0, MANY)}

    assert not seen("train") & seen("test")


@pytest.mark.parametrize("skill", SKILLS)
def test_a_seed_always_gives_the_same_cases(skill: str) -> None:
    first, again, other = (list(cases(skill, "test", seed, 20)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("skill", SKILLS)
def test_a_reply_written_as_asked_reads_back_as_the_answer(skill: str) -> None:
    for case in cases(skill, "test", 0, 50):
        parser = ReplyParser.after(prompt_ids(case, TEMPLATE, TOKENIZER), TOKENIZER)
        *reply, end = reply_ids(case, TEMPLATE, TOKENIZER)
        for token in reply:
            parser.feed(token)
        parser.finish()
        assert parser.message() == case.answer
        assert check(case, parser.message())
        assert TOKENIZER.special_name(end) == "<|im_end|>"


@pytest.mark.parametrize("skill", SKILLS)
def test_another_answer_is_wrong(skill: str) -> None:
    for case in cases(skill, "test", 0, 50):
        assert not check(case, Message("assistant", case.answer.content + "1" if case.exact else ""))


@pytest.mark.parametrize("skill", ["tool_call", "tool_multi", "tool_refusal"])
def test_the_reasoning_says_whether_the_tool_is_there(skill: str) -> None:
    for case in cases(skill, "train", 0, 100):
        if case.thinking:
            there = [tool["function"]["name"] for tool in case.tools]
            said = re.fullmatch(r"There is (.*)\. It takes (.*)(?: of these|, which is missing)\.", why_of(case))
            assert said and said[1].split(", ") == there
            assert set(said[2].split(" and ")) <= set(there) if case.answer.tool_calls else said[2] not in there
            assert case.answer.tool_calls or "which is missing" in why_of(case)


def test_the_reasoning_of_a_lookup_names_both_words() -> None:
    for case in cases("lookup", "train", 0, 100):
        if case.thinking:
            known, said = why_of(case).removeprefix("In the text: ").removesuffix(".").split(" ")
            assert known in case.messages[0].content.split("\n")[0] and said == case.answer.content


def why_of(case: Case) -> str:
    return case.answer.reasoning_content or ""


def test_both_modes_and_every_shape_come_up() -> None:
    for skill in ("copy", "sort", "lookup", "tool_call", "tool_multi", "tool_refusal"):
        assert {case.thinking for case in cases(skill, "train", 0, 50)} == {True, False}
    assert {len(case.tools) for case in cases("tool_call", "train", 0, 50)} == {1, 2, 3}
    assert {case.answer.content for case in cases("count", "train", 0, 300)} == set("0123456789")


@given(st.integers(0, 999), st.integers(0, 999))
def test_sums_and_differences_on_paper(a: int, b: int) -> None:
    total, work = add(a, b)
    assert total == a + b and work.endswith(f"={a + b}")
    assert_true_columns(work)
    larger, smaller = max(a, b), min(a, b)
    difference, work = subtract(larger, smaller)
    assert difference == larger - smaller and int(work.rpartition("=")[2]) == difference
    assert_true_columns(work)


@given(st.integers(1, 99), st.integers(2, 9))
def test_products_on_paper(a: int, b: int) -> None:
    product, work = multiply(a, b)
    assert product == sum([a] * b) and work.endswith(f"={product}")
    assert_true_columns(work)


def assert_true_columns(work: str) -> None:
    """Every line between the first and the last is true, and their last digits from below make the result."""
    _, *columns, result = work.split("\n")
    for column in columns:
        sides = column.split("=")  # a line goes on with what it just found: 4*6=24+4=28
        for side, found in zip(sides, sides[1:], strict=False):
            assert evaluate(side) == int(re.match(r"\d+", found)[0]), column
    ends = [column.rpartition("=")[2] for column in columns]
    assert "=" + ends[-1] + "".join(end[-1] for end in reversed(ends[:-1])) == result


def evaluate(side: str) -> int:
    product = re.match(r"(\d+)\*(\d+)", side)
    start = int(product[1]) * int(product[2]) if product else 0
    rest = side[product.end() :] if product else side
    return start + sum(map(int, re.findall(r"[+-]?\d+", rest)))


def test_a_word_stands_in_one_list_only() -> None:
    assert len(set(words.ALL)) == len(words.ALL)


def test_random_cases_need_no_state_outside_their_generator() -> None:
    for make in SKILLS.values():
        first, second = (make(random.Random(7)) for _ in range(2))
        assert isinstance(first, Case) and first == second
