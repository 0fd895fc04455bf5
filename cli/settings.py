"""What a conversation asks of the model, and where each value came from: flag, env, session, /set or the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cli.options import ChatOptions, parse_tokens
from hybrid.errors import UsageError

if TYPE_CHECKING:
    from cli.model import Model

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens")
ALIASES = {"temp": "temperature", "n": "max_tokens", "thinking": "think", "budget": "think_budget"}
_ON = {"on": True, "yes": True, "true": True, "1": True, "off": False, "no": False, "false": False, "0": False}


class Value(NamedTuple):
    value: Any
    origin: str


def parse_switch(text: str) -> bool:
    """'on' or 'off'. Raises UsageError."""
    value = _ON.get(text.lower())
    if value is None:
        raise UsageError(f"{text!r} is neither on nor off.", "Write on or off.")
    return value


def _number(kind: Callable[[str], Any], valid: Callable[[Any], bool], meaning: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not valid(value):
            raise UsageError(f"{text!r} does not fit.", f"It must be {meaning}.")
        return value

    return parse


PARSERS: Mapping[str, Callable[[str], Any]] = {
    "think": parse_switch,
    "think_budget": parse_tokens,
    "temperature": _number(float, lambda x: 0 <= x < float("inf"), "a number, 0 or more"),
    "top_p": _number(float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "top_k": _number(int, lambda x: x >= 0, "a whole number, 0 (no limit) or more"),
    "min_p": _number(float, lambda x: 0 <= x <= 1, "between 0 and 1"),
    "seed": _number(int, lambda x: x >= 0, "a whole number"),
    "max_tokens": parse_tokens,
}


class Settings:
    """Values given by the user; everything else is the model's own choice."""

    def __init__(self, values: Mapping[str, Value] | None = None) -> None:
        self._values = dict(values or {})

    @classmethod
    def from_options(cls, options: ChatOptions) -> Settings:
        given = {name: getattr(options, {"temperature": "temp"}.get(name, name)) for name in PARSERS}
        origins = {name: options.origins.get({"temperature": "temp"}.get(name, name), "flag") for name in PARSERS}
        return cls({name: Value(value, origins[name]) for name, value in given.items() if value is not None})

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take over what a saved conversation had set, where nothing was given now."""
        for name, value in saved.items():
            if name in PARSERS and name not in self._values:
                self._values[name] = Value(value, "session")

    def saved(self) -> dict[str, Any]:
        """What belongs to the conversation rather than to this call of the program."""
        return {name: given.value for name, given in self._values.items() if given.origin in ("/set", "session")}

    def set(self, name: str, text: str) -> Any:
        """Change one value; 'default' gives it back to the model. Raises UsageError."""
        name = self.known(name)
        if text == "default":
            self._values.pop(name, None)
            return None
        value = PARSERS[name](text)
        self._values[name] = Value(value, "/set")
        return value

    @staticmethod
    def known(name: str) -> str:
        """The full name of a setting. Raises UsageError with the nearest names."""
        from difflib import get_close_matches

        plain = name.lower().replace("-", "_")
        plain = ALIASES.get(plain, plain)
        if plain not in PARSERS:
            near = get_close_matches(plain, PARSERS, n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(PARSERS)}."
            raise UsageError(f"There is no setting {name!r}.", remedy)
        return plain

    def thinking(self, kimi: Model) -> bool:
        given = self._values.get("think")
        return kimi.default_thinking if given is None else given.value

    @property
    def think_budget(self) -> int | None:
        given = self._values.get("think_budget")
        return None if given is None else given.value

    def params(self, kimi: Model) -> Any:
        """The model's defaults, thinking or instant, with the given values in their place. Raises UsageError."""
        given = {name: value.value for name, value in self._values.items() if name in SAMPLING}
        return dataclasses.replace(kimi.default_params(self.thinking(kimi)), **given)

    def table(self, kimi: Model) -> list[tuple[str, str, str]]:
        """(name, value in force, origin) of everything that can be set."""
        params = self.params(kimi)
        effective = {name: getattr(params, name) for name in SAMPLING}
        effective |= {"think": "on" if self.thinking(kimi) else "off", "think_budget": self.think_budget}
        origins = {name: given.origin for name, given in self._values.items()}
        return [
            (name, "none" if effective[name] is None else str(effective[name]), origins.get(name, "model"))
            for name in PARSERS
        ]
