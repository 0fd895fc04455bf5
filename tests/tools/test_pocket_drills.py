"""Every word of a drill's answer is found again by a slow reader."""

import random
import re

from pocket.drills import facts, pairs, present, running

MANY = 200


def test_pairs_come_in_the_order_asked() -> None:
    for seed in range(MANY):
        case = pairs(random.Random(seed))
        told, asked = case.messages[0].content.split(".\nAsked: ")
        known = dict(pair.split(" ", 1) for pair in told.removeprefix("Pairs: ").split(", "))
        assert case.answer.content == ", ".join(f"{word} {known[word]}" for word in asked.removesuffix(".").split(", "))


def test_who_has_what_stands_in_one_sentence() -> None:
    for seed in range(MANY):
        case = facts(random.Random(seed))
        asked, told = sorted(case.messages[0].content.split("\n"))
        sentences = re.split(r"(?<=\.) ", told.removeprefix("Text: "))
        said = case.answer.content.split(", ")
        words = asked.removeprefix("Asked: ").removesuffix(".").split(", ")
        assert len(said) == len(words) >= 1
        for word, pair in zip(words, said, strict=True):
            known, found = pair.split(" ", 1)
            assert known == word and sum(word in sentence and found in sentence for sentence in sentences) == 1


def test_what_is_in_the_list_is_there() -> None:
    seen = set()
    for seed in range(MANY):
        case = present(random.Random(seed))
        asked, told = (re.findall(r"\w+", line)[1:] for line in case.messages[0].content.split("\n"))
        said = [pair.split(" ") for pair in case.answer.content.split(", ")]
        assert said == [[word, "yes" if word in told else "no"] for word in asked]
        seen |= {answer for _, answer in said}
    assert seen == {"yes", "no"}


def test_words_are_numbered() -> None:
    for seed in range(MANY):
        case = running(random.Random(seed))
        items = re.findall(r"\w+", case.messages[0].content.removeprefix("Number these: "))
        counts = dict.fromkeys(items, 0)
        for item, said in zip(items, case.answer.content.split(", "), strict=True):
            counts[item] += 1
            assert said == f"{item} {counts[item]}"
