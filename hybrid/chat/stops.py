"""Strings that end an answer, wherever in it they begin."""

from collections.abc import Sequence


class Stops:
    """Text up to the first of some strings. What may be the beginning of one is held back until that is decided."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.found: str | None = None
        self.behind = 0  # letters of the text from the beginning of `found` on

    def feed(self, text: str) -> str:
        """What is certain to come before any of the strings; of two that are there the one that ends first counts."""
        if self.found is not None:
            self.behind += len(text)
            return ""
        text = self._held + text
        ends = [(at + len(string), at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self.behind = len(text) - at
            self._held = ""
            return text[:at]
        certain = len(text) - self._begun(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back."""
        text, self._held = self._held, ""
        return text

    def _begun(self, text: str) -> int:
        """How many letters at the end of `text` begin one of the strings."""
        longest = max(map(len, self._strings), default=0) - 1
        lengths = range(min(len(text), longest), 0, -1)
        return next((n for n in lengths if any(string.startswith(text[-n:]) for string in self._strings)), 0)
