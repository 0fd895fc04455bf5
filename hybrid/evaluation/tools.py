"""Calling the tool that fits, two of them, or none."""

import json
import random

from hybrid.chat.message import Message, ToolCall
from hybrid.evaluation.case import Case
from hybrid.evaluation.catalogue import TOOLS, Tool, invent

REFUSAL = "I have no tool for that."


def tool_call(rng: random.Random) -> Case:
    """One request for one of 1 to 3 tools."""
    tools = _draw_tools(rng, rng.randint(1, 3))
    return case("tool_call", rng, tools, [rng.choice(tools)])


def tool_multi(rng: random.Random) -> Case:
    """Two requests at once, for the same tool or two of 2 to 3."""
    tools = _draw_tools(rng, rng.randint(2, 3))
    wanted = rng.choices(tools, k=2) if rng.random() < 0.4 else rng.sample(tools, 2)
    return case("tool_multi", rng, tools, wanted)


def tool_refusal(rng: random.Random) -> Case:
    """A request that none of the 1 to 3 tools meets."""
    wanted, *tools = _draw_tools(rng, rng.randint(2, 4))
    question = rng.choice(wanted.asks).format(**wanted.draw(rng))
    thinking = rng.random() < 0.5
    answer = Message("assistant", REFUSAL, f"{_compared(tools, [wanted])}, which is missing." if thinking else None)
    return Case("tool_refusal", (Message("user", question),), declared(tools), thinking, answer, exact=False)


def case(skill: str, rng: random.Random, tools: list[Tool], wanted: list[Tool]) -> Case:
    """A request for the tools `wanted` in order, `tools` being declared."""
    arguments = [tool.draw(rng) for tool in wanted]
    asks = [rng.choice(tool.asks).format(**values) for tool, values in zip(wanted, arguments, strict=True)]
    calls = tuple(
        ToolCall(f"functions.{tool.name}:{index}", tool.name, json.dumps(values))
        for index, (tool, values) in enumerate(zip(wanted, arguments, strict=True))
    )
    thinking = rng.random() < 0.5
    why = f"{_compared(tools, wanted)} of these."
    answer = Message("assistant", "", why if thinking else None, calls)
    return Case(skill, (Message("user", " ".join(asks)),), declared(tools), thinking, answer)


def _compared(tools: list[Tool], wanted: list[Tool]) -> str:
    """What there is and then what is needed: whether it was there is to be said right behind its name, where a model
    that finds a word again sees it."""
    return f"There is {', '.join(tool.name for tool in tools)}. It takes {' and '.join(tool.name for tool in wanted)}"


def declared(tools: list[Tool]) -> tuple[dict, ...]:
    return tuple(tool.declaration() for tool in tools)


def _draw_tools(rng: random.Random, size: int) -> list[Tool]:
    """Tools of different names: known ones, or invented ones that differ in the verb or the thing alone."""
    if rng.random() < 0.65:
        return rng.sample(TOOLS, size)
    tools: dict[str, Tool] = {}
    while len(tools) < size:
        tool = invent(rng)
        tools[tool.name] = tool
    return rng.sample(list(tools.values()), size)
