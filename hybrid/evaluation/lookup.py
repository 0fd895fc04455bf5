"""Facts invented on the spot and a question about one of them: the answer stands in the text and nowhere else.

The question comes first, so that the text is read with it in mind.
"""

import random
from dataclasses import dataclass

from hybrid.chat.message import Message
from hybrid.evaluation.case import Case
from hybrid.evaluation.words import ANIMALS, CITIES, COLOURS, JOBS, NAMES, PETS, THINGS

AGES = tuple(map(str, range(10, 100)))


@dataclass(frozen=True)
class Relation:
    """Something a person has: how it is told, how one asks for it, and how one asks for the person."""

    told: tuple[str, ...]
    asked: tuple[str, ...]
    values: tuple[str, ...]
    who: str


RELATIONS = (
    Relation(
        ("{name}'s {kind} is called {value}.", "{name} has a {kind} called {value}."),
        ("What is {name}'s {kind} called?", "What is the name of {name}'s {kind}?"),
        PETS,
        "Whose {kind} is called {value}?",
    ),
    Relation(
        ("{name} lives in {value}.", "{name} has a house in {value}."),
        ("Where does {name} live?", "In which city does {name} live?"),
        CITIES,
        "Who lives in {value}?",
    ),
    Relation(
        ("{name} works as a {value}.", "{name} is a {value}."),
        ("What does {name} do for a living?", "What is {name}'s job?"),
        JOBS,
        "Who is a {value}?",
    ),
    Relation(
        ("{name}'s favourite colour is {value}.", "{name} likes the colour {value}."),
        ("What is {name}'s favourite colour?", "Which colour does {name} like?"),
        COLOURS,
        "Who likes the colour {value}?",
    ),
    Relation(
        ("{name} bought a {value}.", "{name} has a new {value}."),
        ("What did {name} buy?", "What is it that {name} bought?"),
        THINGS,
        "Who bought a {value}?",
    ),
    Relation(
        ("{name} is {value} years old.", "{name}'s age is {value}."),
        ("How old is {name}?", "What is {name}'s age?"),
        AGES,
        "Who is {value} years old?",
    ),
)
FORMS = ("One word only.", "Answer with one word.", "Just one word, please.")


@dataclass(frozen=True)
class Facts:
    """A short text of 3 to 5 facts, most of them of one kind."""

    relations: list[Relation]
    values: list[dict[str, str]]
    told: list[str]

    @classmethod
    def draw(cls, rng: random.Random) -> "Facts":
        relations = _relations(rng)
        values = _facts(rng, relations)
        told = [rng.choice(relation.told).format(**fact) for relation, fact in zip(relations, values, strict=True)]
        return cls(relations, values, told)

    @property
    def text(self) -> str:
        return " ".join(self.told)

    def case(self, rng: random.Random, chosen: int) -> Case:
        """The text and a question that fits one of its facts only."""
        question, known, said = _question(rng, self.relations[chosen], self.values[chosen])
        thinking = rng.random() < 0.7
        asked = Message("user", f"{question} {rng.choice(FORMS)}\nText: {self.text}")
        answer = Message("assistant", said, f"In the text: {known} {said}." if thinking else None)
        return Case("lookup", (asked,), (), thinking, answer)


def lookup(rng: random.Random) -> Case:
    """One question about one text."""
    facts = Facts.draw(rng)
    return facts.case(rng, rng.randrange(len(facts.told)))


def _relations(rng: random.Random) -> list[Relation]:
    main = rng.choice(RELATIONS)
    return [main if rng.random() < 0.7 else rng.choice(RELATIONS) for _ in range(rng.randint(3, 5))]


def _facts(rng: random.Random, relations: list[Relation]) -> list[dict[str, str]]:
    """Who has what; where two facts differ in kind, both may be about one person."""
    size = len(relations)
    names, kinds, values = rng.sample(NAMES, size), rng.sample(ANIMALS, size), _different_values(rng, relations)
    one, other = rng.sample(range(size), 2)
    if relations[one] != relations[other]:
        names[other] = names[one]
    rows = zip(names, kinds, values, strict=True)
    return [{"name": name, "kind": kind, "value": value} for name, kind, value in rows]


def _question(rng: random.Random, relation: Relation, fact: dict[str, str]) -> tuple[str, str, str]:
    """A question, the word it names, and its answer."""
    if rng.random() < 0.25:
        return relation.who.format(**fact), fact["value"], fact["name"]
    return rng.choice(relation.asked).format(**fact), fact["name"], fact["value"]


def _different_values(rng: random.Random, relations: list[Relation]) -> list[str]:
    drawn = {relation: iter(rng.sample(relation.values, len(relations))) for relation in dict.fromkeys(relations)}
    return [next(drawn[relation]) for relation in relations]
