"""A reply read as it is written, or all at once: up to the string that ends it, with its reasoning counted."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace

from hybrid.chat.message import Message, Part, Text
from hybrid.chat.parser import ReplyParser
from hybrid.chat.plain import PlainParser
from hybrid.chat.stops import Stops


class Reading:
    """Of the ids of a reply; the strings `stop` count in the answer, not in reasoning."""

    def __init__(self, parser: ReplyParser | PlainParser, stop: Sequence[str] = ()) -> None:
        self._parser = parser
        self._stops = Stops(stop)
        self.thoughts = 0  # ids of the reasoning

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete: nothing that follows belongs to the answer."""
        return self._stops.found is not None

    @property
    def thinking(self) -> bool:
        """Whether the next id belongs to the reasoning."""
        return self._parser.thinking

    def read(self, ids: Iterable[int], ends: Container[int]) -> Message:
        """The reply that `ids` are, all at once, without the `ends` of a turn among them."""
        for token in ids:
            if token not in ends:
                self.feed(token)
        return self.finish()

    def feed(self, token: int) -> None:
        """Take the next id, which is no end of a turn."""
        self.thoughts += self._parser.thinking
        self._note(self._parser.feed(token))

    def finish(self) -> Message:
        """The reply, when no more ids come."""
        self._note(self._parser.finish())
        message = self._parser.message()
        return replace(message, content=message.content[: len(message.content) - self._stops.behind])

    def _note(self, parts: Iterable[Part]) -> None:
        for part in parts:
            if isinstance(part, Text):
                self._stops.feed(part.text)
