"""Tools that the cases declare, and how people ask for them.

A slot of an `ask` is a parameter of the tool; its kind says which values it takes and which JSON type it has.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybrid.evaluation.words import (
    ANIMALS,
    CITIES,
    COLOURS,
    DAYS,
    FOODS,
    LANGUAGES,
    MONEY,
    NAMES,
    OBJECTS,
    PETS,
    ROOMS,
    THINGS,
    TITLES,
    TOPICS,
    VERBS,
)

Value = str | int


def _few(rng: random.Random) -> int:
    return rng.randint(1, 60)


def _title(rng: random.Random) -> str:
    return " ".join(rng.sample(TITLES + COLOURS, rng.randint(1, 3)))


KINDS: dict[str, Callable[[random.Random], Value]] = {
    "few": _few,
    "hour": lambda rng: rng.randint(1, 23),
    "many": lambda rng: rng.randint(1, 999),
    "title": _title,
    "switch": lambda rng: rng.choice(("on", "off")),
    "animal": lambda rng: rng.choice(ANIMALS),
    "city": lambda rng: rng.choice(CITIES),
    "colour": lambda rng: rng.choice(COLOURS),
    "day": lambda rng: rng.choice(DAYS),
    "food": lambda rng: rng.choice(FOODS),
    "language": lambda rng: rng.choice(LANGUAGES),
    "money": lambda rng: rng.choice(MONEY),
    "name": lambda rng: rng.choice(NAMES),
    "pet": lambda rng: rng.choice(PETS),
    "room": lambda rng: rng.choice(ROOMS),
    "thing": lambda rng: rng.choice(THINGS),
    "topic": lambda rng: rng.choice(TOPICS),
    "word": lambda rng: rng.choice(OBJECTS),
}
SCHEMAS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(KINDS, {"type": "string"}),
    **dict.fromkeys(("few", "hour", "many"), {"type": "integer"}),
    "switch": {"type": "string", "enum": ["on", "off"]},
}


@dataclass(frozen=True)
class Tool:
    name: str
    about: str
    slots: dict[str, str]
    asks: tuple[str, ...]

    def declaration(self) -> dict[str, Any]:
        """In OpenAI's form; every parameter is required."""
        properties = {slot: SCHEMAS[kind] for slot, kind in self.slots.items()}
        parameters = {"type": "object", "properties": properties, "required": list(self.slots)}
        function = {"name": self.name, "description": self.about, "parameters": parameters}
        return {"type": "function", "function": function}

    def draw(self, rng: random.Random) -> dict[str, Value]:
        """Arguments, in the order the model sees the parameters declared; no two of them equal."""
        while True:
            values = {slot: KINDS[kind](rng) for slot, kind in sorted(self.slots.items())}
            if len(set(values.values())) == len(values):
                return values


TOOLS = (
    Tool(
        "get_weather",
        "Get the weather of a city.",
        {"city": "city"},
        ("What is the weather in {city}?", "How is the weather in {city} today?", "Weather in {city}, please."),
    ),
    Tool(
        "get_time",
        "Get the time in a city.",
        {"city": "city"},
        ("What time is it in {city}?", "Tell me the time in {city}."),
    ),
    Tool("set_alarm", "Set an alarm.", {"hour": "hour"}, ("Set an alarm for {hour}.", "Wake me at {hour}.")),
    Tool(
        "set_timer",
        "Set a timer.",
        {"minutes": "few"},
        ("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes."),
    ),
    Tool(
        "send_message",
        "Send a message.",
        {"to": "name", "text": "title"},
        ('Send {to} the message "{text}".', 'Write "{text}" to {to}.'),
    ),
    Tool("call_person", "Call a person.", {"name": "name"}, ("Call {name}.", "I want to talk to {name}.")),
    Tool("play_song", "Play a song.", {"title": "title"}, ('Play the song "{title}".', 'Play "{title}".')),
    Tool(
        "translate",
        "Translate a word.",
        {"word": "word", "language": "language"},
        ('Translate "{word}" into {language}.', 'What is "{word}" in {language}?'),
    ),
    Tool(
        "convert_money",
        "Convert money.",
        {"amount": "many", "source": "money", "target": "money"},
        ("Convert {amount} {source} into {target}.", "Change {amount} {source} to {target}."),
    ),
    Tool(
        "add_event",
        "Add an event to the calendar.",
        {"day": "day", "title": "title"},
        ('Put "{title}" into my calendar on {day}.', 'Add the event "{title}" for {day}.'),
    ),
    Tool(
        "find_recipe",
        "Find a recipe.",
        {"food": "food"},
        ("Find a recipe with {food}.", "I want to cook something with {food}."),
    ),
    Tool(
        "book_table",
        "Book a table.",
        {"city": "city", "people": "few"},
        ("Book a table for {people} people in {city}.", "We want to eat in {city}, a table for {people} people."),
    ),
    Tool("buy_ticket", "Buy a ticket.", {"city": "city"}, ("Buy a ticket to {city}.", "I need a ticket to {city}.")),
    Tool(
        "switch_light",
        "Switch a light.",
        {"room": "room", "state": "switch"},
        ("Turn {state} the light in the {room}.", "Switch the light in the {room} {state}."),
    ),
    Tool(
        "set_heating",
        "Set the heating of a room.",
        {"room": "room", "degrees": "few"},
        ("Heat the {room} to {degrees} degrees.", "Set the heating in the {room} to {degrees} degrees."),
    ),
    Tool(
        "order_food",
        "Order food.",
        {"food": "food", "portions": "few"},
        ("Order {portions} portions of {food}.", "Get me {portions} portions of {food}."),
    ),
    Tool(
        "find_route",
        "Find a route.",
        {"start": "city", "goal": "city"},
        ("How do I get from {start} to {goal}?", "Find the way from {start} to {goal}."),
    ),
    Tool("get_news", "Get the news.", {"topic": "topic"}, ("Show me the news about {topic}.", "News about {topic}?")),
    Tool("feed_pet", "Feed a pet.", {"pet": "pet"}, ("Feed {pet}.", "Give {pet} something to eat.")),
    Tool(
        "rent_car",
        "Rent a car.",
        {"city": "city", "days": "few"},
        ("Rent a car in {city} for {days} days.", "I need a car in {city} for {days} days."),
    ),
    Tool("roll_die", "Roll a die.", {"sides": "few"}, ("Roll a die with {sides} sides.", "Roll a {sides} sided die.")),
    Tool(
        "paint_thing",
        "Paint a thing.",
        {"thing": "thing", "colour": "colour"},
        ("Paint the {thing} {colour}.", "Make the {thing} {colour}."),
    ),
)


def invent(rng: random.Random) -> Tool:
    """A tool nobody has seen: only its declaration says that it exists."""
    verb, thing = rng.choice(VERBS), rng.choice(THINGS)
    slot, kind, words = rng.choice((("owner", "name", "of {owner}"), ("number", "many", "number {number}")))
    asks = (f"Please {verb} the {thing} {words}.", f"Can you {verb} the {thing} {words}?")
    return Tool(f"{verb}_{thing}", f"To {verb} a {thing}.", {slot: kind}, asks)
