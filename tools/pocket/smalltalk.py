"""Conversations that are trained and not scored: manners, a name from an earlier turn, and what a tool returned."""

import json
import random
from collections.abc import Callable
from dataclasses import replace

from hybrid.chat.message import Message
from hybrid.evaluation.case import Case
from hybrid.evaluation.catalogue import TOOLS, Tool
from hybrid.evaluation.lookup import Facts
from hybrid.evaluation.skills import SKILLS, draw
from hybrid.evaluation.tools import case as tool_case
from hybrid.evaluation.words import NAMES, OBJECTS
from pocket.drills import facts, pairs, present, running

HELP = "I can do sums, sort, count and repeat things, find facts in a text and call tools."
WHO = "I am Pocket, a very small model built like Kimi K2.5."
SAYINGS = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "hello", "hi", "Hi there"), "Hello! How can I help?", "A greeting."),
    (("Good morning", "Good morning!"), "Good morning! How can I help?", "A greeting."),
    (("Good evening", "Good evening!"), "Good evening! How can I help?", "A greeting."),
    (("How are you?", "How are you doing?", "how are you"), "I am fine, thank you. And you?", "Manners."),
    (("Who are you?", "What are you?", "What is your name?", "who are you"), WHO, "A question about me."),
    (("What can you do?", "Help", "How can you help me?", "help me"), HELP, "A question about me."),
    (("Thanks", "Thank you!", "Thanks!", "Thank you very much."), "You are welcome!", "Manners."),
    (("Bye", "Goodbye!", "See you", "Good night"), "Goodbye!", "Manners."),
)
NAMED = ("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}.")
ASKED = ("What is my name?", "Who am I?", "Do you remember my name?")
TOLD = {
    "get_weather": ("weather", ("sunny", "cloudy", "rainy", "windy", "cold", "hot"), "It is {value} in {city}."),
    "get_time": ("hour", tuple(range(24)), "It is {value} in {city}."),
    "translate": ("translation", OBJECTS, '"{word}" in {language} is "{value}".'),
    "convert_money": ("result", tuple(range(1, 999)), "{amount} {source} are {value} {target}."),
    "buy_ticket": ("price", tuple(range(1, 999)), "The ticket to {city} costs {value}."),
    "rent_car": ("price", tuple(range(1, 999)), "The car in {city} costs {value}."),
}
RESULTS = tuple((tool, *TOLD[tool.name]) for tool in TOOLS if tool.name in TOLD)


def manners(rng: random.Random) -> Case:
    """A word or two, answered alike every time."""
    said, answer, why = rng.choice(SAYINGS)
    return _talk(rng, "manners", (Message("user", rng.choice(said)),), answer, why)


def name_recall(rng: random.Random) -> Case:
    """The name stands a few turns back, or nowhere."""
    name = rng.choice(NAMES)
    turns = [Message("user", rng.choice(NAMED).format(name)), Message("assistant", f"Nice to meet you, {name}!")]
    known = rng.random() < 0.8
    history = turns if known else []
    if rng.random() < 0.5:
        said, answer, _ = rng.choice(SAYINGS)
        history = [*history, Message("user", rng.choice(said)), Message("assistant", answer)]
    if known and rng.random() < 0.3:
        return _talk(rng, "name_recall", tuple(turns[:1]), turns[1].content, "A greeting.")
    question = Message("user", rng.choice(ASKED))
    answer, why = (f"Your name is {name}.", f"The name is {name}.") if known else ("I do not know.", "No name yet.")
    return _talk(rng, "name_recall", (*history, question), answer, why)


def tool_result(rng: random.Random) -> Case:
    """A call was made and answered: say what came out."""
    tool, field, values, sentence = rng.choice(RESULTS)
    asked = tool_case("tool_result", rng, [tool], [tool])
    value = rng.choice(values)
    said = sentence.format(value=value, **_arguments(tool, asked))
    call = asked.answer.tool_calls[0]
    result = Message("tool", json.dumps({field: value}), tool_call_id=call.id, name=call.name)
    why = "Say the result." if asked.thinking else None
    return replace(asked, messages=(*asked.messages, asked.answer, result), answer=Message("assistant", said, why))


def second_question(rng: random.Random) -> Case:
    """A question of some skill after another one was answered."""
    first, second = (SKILLS[rng.choice(("copy", "sort", "arithmetic", "lookup"))](rng) for _ in range(2))
    if "test" in (first.split, second.split):
        return second_question(rng)
    return replace(second, skill="second_question", messages=(*first.messages, first.answer, *second.messages))


def lookup_chat(rng: random.Random) -> Case:
    """A text and several questions about it, one after the other: more to learn from than one answer per text."""
    facts = Facts.draw(rng)
    order = rng.sample(range(len(facts.told)), rng.randint(2, len(facts.told)))
    cases = [facts.case(rng, chosen) for chosen in order]
    if any(case.split == "test" for case in cases):
        return lookup_chat(rng)
    first, *more = cases
    turns = [first.messages[0], first.answer]
    for case in more:
        question = case.messages[0].content.removesuffix(f"\nText: {facts.text}")
        turns += [Message("user", question), case.answer]
    return replace(cases[-1], skill="lookup_chat", messages=tuple(turns[:-1]))


def who(rng: random.Random) -> Case:
    """The harder questions of a lookup: what is asked for stands before what is known."""
    while True:
        case = draw("lookup", "train", rng)
        if case.messages[0].content.startswith("Who"):
            return replace(case, skill="who")


TALK: dict[str, Callable[[random.Random], Case]] = {
    "manners": manners,
    "name_recall": name_recall,
    "tool_result": tool_result,
    "second_question": second_question,
    "lookup_chat": lookup_chat,
    "who": who,
    "pairs": pairs,
    "facts": facts,
    "present": present,
    "running": running,
}


def _talk(rng: random.Random, skill: str, messages: tuple[Message, ...], said: str, why: str) -> Case:
    thinking = rng.random() < 0.5
    return Case(skill, messages, (), thinking, Message("assistant", said, why if thinking else None))


def _arguments(tool: Tool, asked: Case) -> dict[str, object]:
    values: dict[str, object] = json.loads(asked.answer.tool_calls[0].arguments)
    assert values.keys() == tool.slots.keys()
    return values
