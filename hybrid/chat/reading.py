"""A reply read as it is written, or all at once: up to the string that ends it, with its reasoning counted."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace

from hybrid.chat.message import Message, Part, Text, ToolCall
from hybrid.chat.parser import ReplyParser
from hybrid.chat.plain import PlainParser
from hybrid.chat.stops import Stops


class Reading:
    """Of the ids of a reply; the strings `stop` count in the answer, not in reasoning, which may have `budget` ids."""

    def __init__(self, parser: ReplyParser | PlainParser, stop: Sequence[str] = (), budget: int | None = None) -> None:
        self._parser = parser
        self._stops = Stops(stop)
        self._budget = budget
        self.thoughts = self.words = 0  # ids of the reasoning, and all others
        self.called = False  # whether a tool was, before a stop string

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete: nothing that follows belongs to the answer."""
        return self._stops.found is not None

    @property
    def stop_string(self) -> str | None:
        """Which one it is."""
        return self._stops.found

    @property
    def thinking(self) -> bool:
        """Whether the next id belongs to the reasoning."""
        return self._parser.thinking

    @property
    def spent(self) -> bool:
        """Whether the reasoning has had its budget and goes on."""
        return self.thinking and self._budget is not None and self.thoughts >= self._budget

    def read(self, ids: Iterable[int], ends: Container[int]) -> Message:
        """The reply that `ids` are, all at once, without the `ends` of a turn among them."""
        for token in ids:
            if token not in ends:
                self.feed(token)
        self.finish()
        return self.message()

    def feed(self, token: int) -> list[Part]:
        """Take the next id, which is no end of a turn; the parts that became certain with it."""
        if self.thinking:
            self.thoughts += 1
        else:
            self.words += 1
        return self._certain(self._parser.feed(token))

    def finish(self) -> list[Part]:
        """What was held back, when no more ids come."""
        if self.stopped:
            return []
        return self._certain(self._parser.finish()) + _text(self._stops.flush())

    def message(self, *, interrupted: bool = False) -> Message:
        """The reply so far."""
        message = self._parser.message(interrupted=interrupted)
        return replace(message, content=message.content[: len(message.content) - self._stops.behind])

    def _certain(self, parts: Iterable[Part]) -> list[Part]:
        found: list[Part] = []
        for part in parts:
            if isinstance(part, Text):
                found += _text(self._stops.feed(part.text))
            elif not self.stopped:
                self.called = self.called or isinstance(part, ToolCall)
                found += [*_text(self._stops.flush()), part]
        return found


def _text(text: str) -> list[Part]:
    return [Text(text)] if text else []
