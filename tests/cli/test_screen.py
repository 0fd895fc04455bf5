"""The live lines on an emulated terminal, against the plain list of what should be visible."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli import screen as module
from cli.screen import Screen


class _Terminal(io.StringIO):
    """Feeds what is written to an emulator."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.emulator = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.Stream(self.emulator)

    def write(self, text: str) -> int:
        self._stream.feed(text)
        return len(text)

    def lines(self) -> list[str]:
        above = ["".join(row[x].data for x in range(self.emulator.columns)) for row in self.emulator.history.top]
        text = [line.rstrip() for line in above + list(self.emulator.display)]
        while text and not text[-1]:
            text.pop()
        return text


@pytest.fixture(autouse=True)
def _size() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.shutil, "get_terminal_size", lambda: os.terminal_size((20, 8)))
        yield


words = st.text("abc ", max_size=20).map(str.rstrip).map(lambda text: text or "x")
pictures = st.lists(st.tuples(st.lists(words, max_size=3), st.lists(words, max_size=7)), max_size=12)


@given(pictures)
def test_any_sequence_of_pictures_leaves_scrollback_and_live_lines(steps: list[tuple[list[str], list[str]]]) -> None:
    terminal = _Terminal(20, 8)
    screen = Screen(terminal)
    printed: list[str] = []
    for above, live in steps:
        screen.draw(live, above)
        printed += above
        assert terminal.lines() == printed + live
    screen.clear()
    assert terminal.lines() == printed


def test_unchanged_lines_are_not_written_again() -> None:
    out = io.StringIO()
    screen = Screen(out)
    screen.draw(["first", "second"])
    before = len(out.getvalue())
    screen.draw(["first", "second"])
    assert len(out.getvalue()) == before
    screen.draw(["first", "changed"])
    assert "first" not in out.getvalue()[before:]


def test_a_line_the_terminal_finds_wider_takes_one_row() -> None:
    terminal = _Terminal(20, 8)
    screen = Screen(terminal)
    screen.draw(["x" * 26, "below"])
    screen.draw(["y", "below"])
    assert terminal.lines() == ["y", "below"]
