"""The model's output as it is, for prompts that are no conversation."""

from hybrid.chat.message import Message, Part, Text
from hybrid.chat.tokenizer import Tokenizer


class PlainParser:
    """As `ReplyParser`, for text in which nothing is a marker; control tokens are left out of it."""

    thinking = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._text: list[str] = []

    def feed(self, token: int) -> list[Part]:
        return self._part(self._decoder.feed(token))

    def finish(self) -> list[Part]:
        """U+FFFD if the text ends in the middle of a character."""
        return self._part(self._decoder.flush())

    def message(self, *, interrupted: bool = False) -> Message:
        return Message("assistant", "".join(self._text), interrupted=interrupted)

    def _part(self, text: str) -> list[Part]:
        self._text.append(text)
        return [Text(text)] if text else []
