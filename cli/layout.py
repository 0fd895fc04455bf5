"""Markdown laid out as terminal lines: markdown-it parses, rich measures, wraps and colours.

Three choices for chat: a single newline in the source is a line break (models mean it), HTML is text (it would vanish
otherwise), and `\\(` `\\[` stay as written (models write formulas that way).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Literal

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode
from rich.console import Console
from rich.text import Text

_STYLES = {"strong": "bold", "em": "italic", "s": "strike", "code_inline": "cyan", "heading": "bold"}
_JUSTIFY: dict[str, Literal["right", "center"]] = {"text-align:right": "right", "text-align:center": "center"}
_TRAILING = re.compile(r"(?: +(?=(?:\x1b\[[0-9;]*m)*$))+")
_FORMULA = {"\\(": "\\)", "\\[": "\\]"}
_NARROWEST = 8


@cache
def parser() -> MarkdownIt:
    """CommonMark with tables and strikethrough, and the choices above."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("reference")
    markdown.inline.ruler.before("escape", "formula", _formula)
    return markdown


def _formula(state: StateInline, silent: bool) -> bool:
    """`\\(...\\)` and `\\[...\\]` up to their end, or the opening alone where no end is in sight."""
    opening = state.src[state.pos : state.pos + 2]
    if opening not in _FORMULA:
        return False
    end = state.src.find(_FORMULA[opening], state.pos + 2)
    taken = state.src[state.pos : end + 2] if end >= 0 else opening
    if not silent:
        state.pending += taken
    state.pos += len(taken)
    return True


def tokens(source: str) -> list[Token]:
    return parser().parse(source)


def code_blocks(source: str) -> list[str]:
    """The code blocks of a text in order, as `/copy N` numbers them."""
    return [token.content for token in tokens(source) if token.type in ("fence", "code_block")]


class Layout:
    """Lays markdown out for one console; `numbered` marks code blocks with the command that copies them."""

    def __init__(self, console: Console, *, numbered: bool = False) -> None:
        self._console = console
        self._numbered = numbered
        self._block_number = 0

    def lines(self, source: str, width: int, blocks_before: int = 0) -> list[str]:
        """ANSI lines, none wider than `width` unless nesting leaves fewer than 8 columns.

        `blocks_before` is the number of code blocks earlier in the same text.
        """
        self._block_number = blocks_before
        root = SyntaxTreeNode(tokens(source))
        return self.ansi(self._blocks(root.children, max(width, 1)))

    def ansi(self, lines: Iterable[Text]) -> list[str]:
        with self._console.capture() as capture:
            for line in lines:
                self._console.print(line, soft_wrap=True)
        return [_TRAILING.sub("", line) for line in capture.get().split("\n")[:-1]]

    def wrap(self, text: Text, width: int) -> list[Text]:
        lines = text.wrap(self._console, max(width, 1), tab_size=4)
        return [line for line in lines] or [Text()]

    def _blocks(self, nodes: list[SyntaxTreeNode], width: int, tight: bool = False) -> Iterator[Text]:
        for position, node in enumerate(nodes):
            if position and not tight:
                yield Text()
            yield from self._block(node, max(width, _NARROWEST))

    def _block(self, node: SyntaxTreeNode, width: int) -> Iterator[Text]:
        match node.type:
            case "heading" | "paragraph" | "inline":
                yield from self.wrap(_inline(node, _STYLES.get(node.type, "")), width)
            case "fence" | "code_block":
                yield from self._code(node, width)
            case "bullet_list" | "ordered_list":
                yield from self._list(node, width)
            case "blockquote":
                yield from _prefixed(self._blocks(node.children, width - 2), Text("▌ ", "quiet"))
            case "table":
                yield from self._table(node, width)
            case "hr":
                yield Text("─" * min(width, 24), "quiet")
            case _:
                yield from self.wrap(Text(node.content if not node.children else ""), width)

    def _code(self, node: SyntaxTreeNode, width: int) -> Iterator[Text]:
        from rich.syntax import Syntax

        self._block_number += 1
        language = node.info.split()[0] if node.info.split() else ""
        copy = f"/copy {self._block_number}" if self._numbered else ""
        title = " · ".join(part for part in (language, copy) if part)
        yield self.wrap(Text(f"── {title}".rstrip(), "quiet"), width)[0]
        code = Syntax("", language or "text", theme="ansi_dark").highlight(node.content.expandtabs(4).rstrip("\n"))
        code.rstrip()
        code.no_wrap = False
        for line in code.split("\n", allow_blank=True):
            yield from self.wrap(line, width)
        yield Text("──", "quiet")

    def _list(self, node: SyntaxTreeNode, width: int) -> Iterator[Text]:
        number = int(node.attrs.get("start", 1))
        for item in node.children:
            marker = f" {number}. " if node.type == "ordered_list" else " • "
            number += 1
            tight = all(child.hidden for child in item.children if child.type == "paragraph")
            body = self._blocks(item.children, width - len(marker), tight)
            yield from _prefixed(body, Text(" " * len(marker)), first=Text(marker, "bold"))

    def _table(self, node: SyntaxTreeNode, width: int) -> Iterator[Text]:
        rows = [row.children for part in node.children for row in part.children]
        sides = [_JUSTIFY.get(str(cell.attrs.get("style", ""))) for cell in rows[0]]
        header, *body = [[_inline(cell) for cell in row] for row in rows]
        if width < _NARROWEST * len(header):
            yield from self._records(header, body, width)
            return
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", border_style="quiet")
        for cell, side in zip(header, sides, strict=True):
            table.add_column(cell, justify=side or "left", overflow="fold")
        for row in body:
            table.add_row(*row)
        for segments in self._console.render_lines(table, self._console.options.update(width=width), pad=False):
            yield Text.assemble(*((segment.text, segment.style or "") for segment in segments))

    def _records(self, header: list[Text], body: list[list[Text]], width: int) -> Iterator[Text]:
        """A table too wide for the terminal, one `heading: value` line per cell."""
        for row in body or [header]:
            for name, cell in zip(header, row, strict=False):
                yield from self.wrap(Text.assemble((name.plain, "bold"), ": ", cell), width)
            yield Text("──", "quiet")


def _prefixed(lines: Iterable[Text], prefix: Text, first: Text | None = None) -> Iterator[Text]:
    lead = first or prefix
    empty = True
    for line in lines:
        yield Text.assemble(lead, line)
        lead, empty = prefix, False
    if empty and first is not None:
        yield first.copy()


def _inline(node: SyntaxTreeNode, style: str = "") -> Text:
    """The inline content of a block as styled text."""
    text = Text()
    for child in node.children:
        text.append_text(_span(child))
    if style:
        text.stylize(style)
    return text


def _span(node: SyntaxTreeNode) -> Text:
    match node.type:
        case "inline" | "strong" | "em" | "s":
            return _inline(node, _STYLES.get(node.type, ""))
        case "code_inline":
            return Text(node.content, _STYLES["code_inline"])
        case "softbreak" | "hardbreak":
            return Text("\n")
        case "link":
            return _link(_inline(node), str(node.attrs.get("href", "")))
        case "image":
            return _link(Text(node.content or "image"), str(node.attrs.get("src", "")))
        case _:
            return Text(node.content)


def _link(label: Text, target: str) -> Text:
    """The label and, where it says something else, its address: not every terminal knows hidden links."""
    label.stylize("underline")
    if target and target not in (label.plain, f"mailto:{label.plain}"):
        label.append(f" ({target})", "quiet")
    return label
