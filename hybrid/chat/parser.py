"""The model's output, token by token -> Think, Text and ToolCall parts.

The grammar is a table of markers: what each one begins, seen from where the reply is. A marker that is a special token
of the vocabulary counts only as that token, never when the model merely spells it; a marker the vocabulary lacks is
looked for in the text. Everything lenient follows from the table: tool calls end the reasoning, need no section around
them, and may lack their end when the next marker comes. Only complete calls become ToolCalls; a call that the end of
the reply cuts off comes out as Text, so nothing is lost and nothing half-written is executed.
"""

import json
import re
from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import chain, count

from hybrid.chat.message import CallPiece, Message, Part, Text, Think, ToolCall, join_parts
from hybrid.chat.tokenizer import Tokenizer

THINK_BEGIN, THINK_END = "<think>", "</think>"
# The second spelling is a slip the model makes.
SECTION_BEGIN = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
SECTION_END = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
CALL_BEGIN, CALL_ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"

CALL_ID = re.compile(r"(?:functions\.)?(?P<name>.+):(?P<index>[0-9]+)", re.DOTALL)


class Place(Enum):
    """What the next text of the reply belongs to."""

    THINK = "reasoning"
    TEXT = "answer"
    ID = "id of a call"
    ARGUMENTS = "arguments of a call"


GRAMMAR: dict[Place, dict[str, Place]] = {
    Place.THINK: {
        THINK_BEGIN: Place.THINK,
        CALL_BEGIN: Place.ID,
        **dict.fromkeys([THINK_END, *SECTION_BEGIN], Place.TEXT),
    },
    Place.TEXT: {
        THINK_BEGIN: Place.THINK,
        CALL_BEGIN: Place.ID,
        **dict.fromkeys([THINK_END, *SECTION_BEGIN, *SECTION_END], Place.TEXT),
    },
    Place.ID: {CALL_ARGUMENTS: Place.ARGUMENTS, CALL_BEGIN: Place.ID, CALL_END: Place.TEXT, SECTION_END[0]: Place.TEXT},
    Place.ARGUMENTS: {CALL_BEGIN: Place.ID, CALL_END: Place.TEXT, SECTION_END[0]: Place.TEXT},
}


class ReplyParser:
    """Feed it the generated ids in order, then `finish`. Blanks around the reasoning are left out of the parts.

    `thinking`: the prompt ended with <think>, so the reply begins as reasoning. `call_index`: how many calls the
    conversation holds already; it numbers the calls whose id carries no number. `call_pieces`: calls also come as
    CallPieces while they are written; one that is cut off is then known from those, and does not come out as Text.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool, call_index: int = 0, *, call_pieces: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder()
        self._spelled = {
            place: _Spelled([marker for marker in markers if marker not in tokenizer.specials])
            for place, markers in GRAMMAR.items()
        }
        self._place = Place.THINK if thinking else Place.TEXT
        self._held = ""  # text that may be the beginning of a spelled marker
        self._blanks = ""  # blanks of the reasoning, dropped if it ends here
        self._at_start = True  # nothing but blanks yet at this place
        self._layout = False  # blanks here only set calls apart
        self._id = self._arguments = ""
        self._call_pieces = call_pieces
        self._given: int | None = None  # letters of the arguments that came out as pieces; None before the first
        self._next_index = call_index
        self._calls: list[ToolCall] = []
        self._thoughts: list[str] = []
        self._answer: list[str] = []

    @classmethod
    def after(
        cls, prompt: Sequence[int], tokenizer: Tokenizer, call_index: int = 0, *, call_pieces: bool = False
    ) -> "ReplyParser":
        """A parser for the reply to `prompt`: it begins as reasoning if the prompt ends with <think>, blanks aside.

        Only the end counts: reasoning in the history opens and closes too.
        """
        end = len(prompt)
        while end and tokenizer.token_bytes(prompt[end - 1]).isspace():
            end -= 1
        thinking = end > 0 and tokenizer.special_name(prompt[end - 1]) == THINK_BEGIN
        return cls(tokenizer, thinking, call_index, call_pieces=call_pieces)

    @property
    def thinking(self) -> bool:
        """Whether the reply is inside its reasoning."""
        return self._place is Place.THINK

    def feed(self, token: int) -> list[Part]:
        """The parts that became certain with `token`."""
        name = self._tokenizer.special_name(token)
        if name is None:
            return self._text(self._decoder.feed(token))
        parts = self._text(self._decoder.flush()) + self._release()
        if name in GRAMMAR[self._place]:
            parts += self._pass(name)
        return parts

    def finish(self) -> list[Part]:
        """What was held back. A call that is not complete comes out as Text."""
        parts = self._text(self._decoder.flush()) + self._release()
        return parts + self._abandon()

    def message(self, *, interrupted: bool = False) -> Message:
        """The turn so far for the history: with the very blanks the model wrote, so that the tokens of the next prompt
        are the ones already computed."""
        thoughts = "".join(self._thoughts) or None
        return Message("assistant", "".join(self._answer), thoughts, tuple(self._calls), interrupted=interrupted)

    def _text(self, text: str) -> list[Part]:
        """Text at the current place, and whatever places the markers spelled in it lead to."""
        parts: list[Part] = []
        self._held += text
        while match := self._spelled[self._place].search(self._held):
            before, self._held = self._held[: match.start()], self._held[match.end() :]
            parts += self._write(before)
            parts += self._pass(match[0])
        certain = len(self._held) - self._spelled[self._place].begun(self._held)
        ready, self._held = self._held[:certain], self._held[certain:]
        return parts + self._write(ready)

    def _release(self) -> list[Part]:
        """Text held back as the beginning of a marker that did not come."""
        text, self._held = self._held, ""
        return self._write(text)

    def _write(self, text: str) -> list[Part]:
        match self._place:
            case Place.ID:
                self._id += text
            case Place.ARGUMENTS:
                self._arguments += text
                return self._piece(self._arguments.strip())
            case Place.THINK:
                return self._write_thought(text)
            case Place.TEXT:
                return self._write_answer(text)
        return []

    def _write_thought(self, text: str) -> list[Part]:
        self._thoughts.append(text)
        text = self._blanks + text
        if self._at_start:
            text = text.lstrip()
        visible = text.rstrip()
        self._blanks = text[len(visible) :]
        self._at_start = self._at_start and not visible
        return [Think(visible)] if visible else []

    def _write_answer(self, text: str) -> list[Part]:
        visible = text.lstrip() if self._at_start else text
        self._answer.append(visible if self._layout else text)
        self._at_start = self._at_start and not visible
        return [Text(visible)] if visible else []

    def _pass(self, marker: str) -> list[Part]:
        """Go where `marker` leads. It completes a call if it is the end of calls or the arguments are whole."""
        place = GRAMMAR[self._place][marker]
        parts: list[Part] = []
        if self._place is Place.ARGUMENTS and (marker == CALL_END or _is_object(self._arguments)):
            parts = self._complete()
        elif place is not Place.ARGUMENTS:
            parts = self._abandon()
        self._place, self._at_start, self._blanks = place, True, ""
        self._layout = marker != THINK_END
        return parts + (self._piece("") if place is Place.ARGUMENTS else [])

    def _complete(self) -> list[Part]:
        """The call just ended."""
        name, call_id = self._named()
        if not name:
            return self._abandon()
        call = ToolCall(call_id, name, self._arguments.strip() or "{}")
        pieces = self._piece(call.arguments)
        self._next_index += 1
        self._calls.append(call)
        self._forget_call()
        return [*pieces, call]

    def _named(self) -> tuple[str, str]:
        """Name and id of the call being written; the id gets the form functions.NAME:i, unlike all others."""
        given = self._id.strip()
        match = CALL_ID.fullmatch(given)
        name = match["name"] if match else given.removeprefix("functions.")
        numbers = chain([match["index"]] if match else [], count(self._next_index))
        used = {call.id for call in self._calls}
        return name, next(i for number in numbers if (i := f"functions.{name}:{number}") not in used)

    def _piece(self, arguments: str) -> list[Part]:
        """What `arguments` say beyond what was given of them; at first also when that is nothing."""
        name, call_id = self._named() if self._call_pieces else ("", "")
        if not name or self._given == len(arguments):
            return []
        new = arguments[self._given or 0 :]
        self._given = len(arguments)
        return [CallPiece(call_id, name, new)]

    def _forget_call(self) -> None:
        self._id = self._arguments = ""
        self._given = None

    def _abandon(self) -> list[Part]:
        """What there is of a call that will not be complete, as text on a line of its own."""
        text = f"{self._id.strip()} {self._arguments.strip()}".strip()
        known = self._given is not None
        self._forget_call()
        if not text:
            return []
        if any(piece.strip() for piece in self._answer):
            text = "\n" + text
        self._answer.append(text)
        return [] if known else [Text(text)]


class _Spelled:
    """Markers to look for in text."""

    def __init__(self, markers: Iterable[str]) -> None:
        markers = list(markers)
        self._pattern = re.compile("|".join(map(re.escape, markers))) if markers else None
        self._beginnings = {marker[:end] for marker in markers for end in range(1, len(marker))}

    def search(self, text: str) -> re.Match[str] | None:
        return self._pattern.search(text) if self._pattern else None

    def begun(self, text: str) -> int:
        """How many letters at the end of `text` may be the beginning of a marker."""
        longest = max(map(len, self._beginnings), default=0)
        lengths = range(min(len(text), longest), 0, -1)
        return next((length for length in lengths if text[-length:] in self._beginnings), 0)


def parse_reply(ids: Iterable[int], tokenizer: Tokenizer, thinking: bool, call_index: int = 0) -> list[Part]:
    """The parts of a whole reply at once."""
    parser = ReplyParser(tokenizer, thinking, call_index)
    parts = [part for token in ids for part in parser.feed(token)]
    return join_parts(parts + parser.finish())


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
