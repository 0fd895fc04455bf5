"""Markdown that arrives piece by piece: what can no longer change is printed once, the rest stays live.

A top-level block (or an item of a top-level list) is closed as soon as the next one has a complete first line. Closed
blocks belong above the live lines, in the scrollback; only the open one is laid out again as text arrives.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from markdown_it.token import Token
from rich.text import Text

from cli.layout import Layout, tokens


class _Piece(NamedTuple):
    source: str
    kind: str  # the token type of the block, or of the list whose item it is
    code_blocks: int


class MarkdownStream:
    """Text in by `feed`; `closed` yields lines to print for good, `open` the lines to keep live."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._source = ""
        self._pushed = 0  # leading lines of the open pieces that are in the scrollback already
        self._previous = ""  # kind of the last closed piece
        self._code_blocks = 0

    def feed(self, delta: str) -> None:
        self._source += delta

    def closed(self, width: int, *, final: bool = False) -> list[str]:
        """Lines of all blocks that closed since the last call; with `final`, of everything left."""
        pieces = _pieces(self._source)
        settled = len(pieces) if final else _settled(pieces)
        if not settled:
            return []
        lines = self._lines(pieces[:settled], width)
        fresh = lines[self._pushed :]
        self._pushed = max(0, self._pushed - len(lines))
        self._source = "".join(piece.source for piece in pieces[settled:])
        self._previous = pieces[settled - 1].kind
        self._code_blocks += sum(piece.code_blocks for piece in pieces[:settled])
        return fresh

    def open(self, width: int) -> list[str]:
        """Lines of what may still change, less what `push` gave away."""
        return self._lines(_pieces(self._source), width)[self._pushed :]

    def push(self, lines: int) -> None:
        """The first `lines` of `open` were printed for good because the screen is not high enough to keep them."""
        self._pushed += lines

    def _lines(self, pieces: list[_Piece], width: int) -> list[str]:
        lines: list[str] = []
        previous, code_blocks = self._previous, self._code_blocks
        for piece in pieces:
            if previous and not (previous == piece.kind and piece.kind.endswith("_list_open")):
                lines.append("")
            lines += self._layout.lines(piece.source, width, code_blocks)
            previous, code_blocks = piece.kind, code_blocks + piece.code_blocks
        return lines


def _settled(pieces: list[_Piece]) -> int:
    """How many leading pieces are closed: the one after each must have its first line complete."""
    if len(pieces) < 2:
        return 0
    return len(pieces) - 1 if "\n" in pieces[-1].source.lstrip("\n") else len(pieces) - 2


def _pieces(source: str) -> list[_Piece]:
    """The top-level blocks of a text, lists cut into their items; every character belongs to one piece."""
    parsed = tokens(source)
    starts = _starts(parsed)
    if not starts:
        return []
    text = re.findall(r"[^\n]*\n|[^\n]+", source)
    bounds = [0, *(line for line, _ in starts[1:]), len(text)]
    code_lines = [token.map[0] for token in parsed if token.type in ("fence", "code_block") and token.map]
    found = []
    for (first, after), (_, kind) in zip(zip(bounds, bounds[1:], strict=False), starts, strict=True):
        fences = sum(first <= line < after for line in code_lines)
        found.append(_Piece("".join(text[first:after]), kind, fences))
    return found


def _starts(parsed: list[Token]) -> list[tuple[int, str]]:
    """First line and kind of each piece."""
    starts: list[tuple[int, str]] = []
    kind = ""
    for token in parsed:
        if token.level == 0 and token.nesting >= 0 and token.map is not None:
            kind = token.type
            if not kind.endswith("_list_open"):
                starts.append((token.map[0], kind))
        elif token.level == 1 and token.type == "list_item_open" and token.map is not None:
            starts.append((token.map[0], kind))
    return starts


class PlainStream:
    """The same interface for text that is no markdown, line by line in one style (`Thinking` shown in full)."""

    def __init__(self, layout: Layout, style: str) -> None:
        self._layout = layout
        self._style = style
        self._source = ""
        self._pushed = 0

    def feed(self, delta: str) -> None:
        self._source += delta

    def closed(self, width: int, *, final: bool = False) -> list[str]:
        end = len(self._source) if final else self._source.rfind("\n") + 1
        if not end:
            return []
        lines = self._lines(self._source[:end].removesuffix("\n"), width)
        fresh = lines[self._pushed :]
        self._pushed = 0
        self._source = self._source[end:]
        return fresh

    def open(self, width: int) -> list[str]:
        return self._lines(self._source, width)[self._pushed :] if self._source else []

    def push(self, lines: int) -> None:
        self._pushed += lines

    def _lines(self, source: str, width: int) -> list[str]:
        return self._layout.ansi(self._layout.wrap(Text(source, self._style), width))
