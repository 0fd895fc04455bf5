"""Repeating, counting and sorting."""

import random
from collections.abc import Iterable
from string import ascii_lowercase

from hybrid.chat.message import Message
from hybrid.evaluation.case import Case
from hybrid.evaluation.words import NAMES, OBJECTS

COPY = (
    "Repeat exactly:\n{}",
    "Repeat the next line exactly, nothing else.\n{}",
    "Copy this line:\n{}",
    "Say this and nothing else:\n{}",
    "Write the same again:\n{}",
)
COUNT = (
    "How many times is {} in this list? Just the number.\nList: {}",
    "How often does {} occur here? Just the number.\nList: {}",
    "Count {} in the list below, give only the number.\nList: {}",
)
SORT_WORDS = (
    "Sort these words from A to Z, only the words:\n{}",
    "Put the words in alphabetical order, only the words.\n{}",
    "Alphabetical order, please, only the words:\n{}",
)
SORT_NUMBERS = (
    "Sort these numbers, smallest first, only the numbers:\n{}",
    "Put the numbers in order from small to large, only the numbers.\n{}",
    "Smallest first, please, only the numbers:\n{}",
)


def copy(rng: random.Random) -> Case:
    """A line of words, numbers or letters, to be said again."""
    line = rng.choice((_some_words, _some_numbers, _some_letters, _one_word))(rng)
    return _case("copy", rng, COPY, (line,), line, "Copy the line.")


def count(rng: random.Random) -> Case:
    """How often one word stands in a list of different words. It never follows itself, so that whoever reads along
    always knows where he is."""
    others = rng.sample(OBJECTS, rng.randint(3, 9))
    word = others.pop()
    times = rng.randint(0, min(9, len(others) + 1))
    places = set(rng.sample(range(len(others) + 1), times))
    items = []
    for place, other in enumerate([*others, ""]):
        items += [word] * (place in places) + [other]
    items = items[:-1]
    counted = (f"{item} {items[: index + 1].count(word)}" for index, item in enumerate(items))
    answer = Message("assistant", str(times), f"Count: {', '.join(counted)}")
    question = rng.choice(COUNT).format(word, " ".join(items))
    return Case("count", (Message("user", question),), (), True, answer)


def sort(rng: random.Random) -> Case:
    """3 to 6 words with different first letters, or numbers of two digits."""
    size = rng.randint(3, 6)
    if rng.random() < 0.5:
        numbers = rng.sample(range(10, 100), size)
        return _case("sort", rng, SORT_NUMBERS, (_line(numbers),), _line(sorted(numbers)), "From small to large.")
    words = _with_different_letters(rng, size)
    return _case("sort", rng, SORT_WORDS, (_line(words),), _line(sorted(words)), "From A to Z.")


def _case(skill: str, rng: random.Random, asks: tuple[str, ...], parts: tuple[str, ...], said: str, why: str) -> Case:
    thinking = rng.random() < 0.5
    question = Message("user", rng.choice(asks).format(*parts))
    return Case(skill, (question,), (), thinking, Message("assistant", said, why if thinking else None))


def _line(items: Iterable[object]) -> str:
    return " ".join(map(str, items))


def _some_words(rng: random.Random) -> str:
    return _line(rng.choices(OBJECTS + NAMES, k=rng.randint(2, 8)))


def _some_numbers(rng: random.Random) -> str:
    return _line(rng.randint(0, 10 ** rng.randint(1, 3) - 1) for _ in range(rng.randint(1, 4)))


def _some_letters(rng: random.Random) -> str:
    return _line(rng.choices(ascii_lowercase, k=rng.randint(3, 8)))


def _one_word(rng: random.Random) -> str:
    """Letters of no meaning, without blanks."""
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(3, 8)))


def _with_different_letters(rng: random.Random, size: int) -> list[str]:
    by_letter = {word[0]: word for word in rng.sample(OBJECTS, len(OBJECTS))}
    return rng.sample(list(by_letter.values()), size)
