"""Practice that is not scored: many words of every answer can only be had by finding the same word earlier.

To look up a fact, to count a word and to see that a tool is missing all rest on that, and a case of these says it once
or twice. Without drills 24 million tokens did not teach it: copying can do with places in place of words.
"""

import random

from hybrid.chat.message import Message
from hybrid.evaluation.case import Case
from hybrid.evaluation.lookup import Facts
from hybrid.evaluation.words import ALL, CITIES, COLOURS, JOBS, NAMES, PETS


def pairs(rng: random.Random) -> Case:
    """Words that belong together, asked for in another order."""
    count = rng.randint(2, 9)
    first = rng.sample(rng.choice((NAMES, ALL)), count)
    second = rng.sample(rng.choice((CITIES, JOBS, PETS, ALL, range(10, 100))), count)
    said = [f"{one} {other}" for one, other in zip(first, second, strict=True)]
    order = rng.sample(range(count), count)
    asked = f"Pairs: {', '.join(said)}.\nAsked: {', '.join(first[i] for i in order)}."
    return _drill("pairs", rng, asked, ", ".join(said[i] for i in order))


def present(rng: random.Random) -> Case:
    """Which of some words are in a list."""
    count = rng.randint(1, 9)
    drawn = rng.sample(rng.choice((NAMES, COLOURS, ALL)), min(2 * count, len(COLOURS)))
    there, others = drawn[:count], drawn[count:]
    asked = rng.sample(there, rng.randint(1, len(there))) + others[: rng.randint(0, len(others))]
    rng.shuffle(asked)
    said = ", ".join(f"{word} {'yes' if word in there else 'no'}" for word in asked)
    return _drill("present", rng, f"Asked: {', '.join(asked)}.\nList: {', '.join(there)}.", said)


def facts(rng: random.Random) -> Case:
    """Who has what, as told in sentences: both words stand in one, with others between them."""
    told = Facts.draw(rng)
    names = [value["name"] for value in told.values]
    words = [(value["name"], value["value"]) for value in told.values if names.count(value["name"]) == 1]
    if rng.random() < 0.5:
        words = [(value, name) for name, value in words]
    rng.shuffle(words)
    asked = [f"Asked: {', '.join(known for known, _ in words)}.", f"Text: {told.text}"]
    rng.shuffle(asked)
    return _drill("facts", rng, "\n".join(asked), ", ".join(f"{known} {said}" for known, said in words))


def running(rng: random.Random) -> Case:
    """How often each word of a list has come so far."""
    words = rng.sample(ALL, rng.randint(2, 5))
    items = rng.choices(words, k=rng.randint(3, 12))
    said = ", ".join(f"{item} {items[: index + 1].count(item)}" for index, item in enumerate(items))
    return _drill("running", rng, f"Number these: {', '.join(items)}.", said)


def _drill(skill: str, rng: random.Random, asked: str, said: str) -> Case:
    thinking = rng.random() < 0.2
    return Case(
        skill, (Message("user", asked),), (), thinking, Message("assistant", said, "Look." if thinking else None)
    )
