"""A reply on a terminal: prefill bar, folded thoughts, streamed markdown.

Three phases share the live lines at the bottom of the screen: the prompt is read, the model thinks, the model answers.
The engine's thread reports progress and parts, another thread ticks; one lock keeps their pictures apart.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.text import Text as Styled

from cli.layout import Layout
from cli.markdown import MarkdownStream, PlainStream
from cli.output import count, duration, printable
from cli.screen import Screen
from cli.views import QUIET_S, progress_line

if TYPE_CHECKING:
    from cli.model import Reply
    from hybrid.chat.message import Part
    from hybrid.progress import Progress

Thoughts = Literal["fold", "show", "hide"]
_TAIL_ROWS = 6
_FASTEST_S, _SLOWEST_S = 0.04, 0.3


class LiveView:
    """One reply. `interactive` adds what only makes sense with a prompt below: keys and /commands."""

    def __init__(
        self,
        console: Console,
        *,
        thoughts: Thoughts = "fold",
        raw: bool = False,
        stream: bool = True,
        interactive: bool = False,
    ) -> None:
        self._layout = Layout(console, numbered=interactive)
        self._file = console.file
        self._screen = Screen(console.file)
        self._thoughts, self._raw, self._stream, self._interactive = thoughts, raw, stream, interactive
        self._lock = threading.Lock()
        self._answer = MarkdownStream(self._layout)
        self._shown_thoughts = PlainStream(self._layout, "thought")
        self._thought = ""
        self._phase: Literal["prompt", "think", "answer", "done"] = "prompt"
        self._began = self._phase_began = time.monotonic()
        self._reply: Reply | None = None
        self._prefill: Progress | None = None
        self._prefill_start: tuple[float, int] = (0.0, 0)
        self._stopping = False
        self._held = ""  # raw text kept back by --no-stream
        self._last_end = ""
        self._next_draw = 0.0

    def begin(self, reply: Reply) -> None:
        with self._lock:
            self._reply = reply

    def progress(self, progress: Progress) -> None:
        with self._lock:
            if self._prefill is None:
                self._prefill_start = (time.monotonic(), progress.done)
            self._prefill = progress
            self._draw()

    def part(self, part: Part) -> None:
        from hybrid.chat.message import Text, Think

        with self._lock:
            if isinstance(part, Think):
                self._enter("think")
                self._think(printable(part.text))
            elif isinstance(part, Text):
                self._enter("answer")
                self._say(printable(part.text))
            else:
                self._enter("answer")
                self._print([Styled(printable(f"[asks for {part.name}({part.arguments})]"), "quiet")])
            self._draw()

    def stopping(self) -> None:
        self._stopping = True

    def tick(self) -> None:
        with self._lock:
            self._draw()

    def finish(self) -> None:
        with self._lock:
            if self._phase == "done":
                return
            self._enter("done")
            self._screen.draw([], above=self._answer.closed(self._screen.width, final=True))
            self._write(self._held)
            self._write("" if self._last_end in ("", "\n") else "\n")

    def _think(self, text: str) -> None:
        self._thought += text
        if self._thoughts == "show":
            self._shown_thoughts.feed(text)

    def _say(self, text: str) -> None:
        if not self._raw:
            self._answer.feed(text)
            return
        self._last_end = text[-1:] or self._last_end
        if self._stream:
            self._screen.clear()
            self._write(text)
        else:
            self._held += text

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()

    def _enter(self, phase: Literal["think", "answer", "done"]) -> None:
        """Leave a phase for the next; thoughts are folded when they end."""
        if phase == self._phase:
            return
        now = time.monotonic()
        if self._phase == "think":
            self._fold(now - self._phase_began)
        self._phase, self._phase_began, self._next_draw = phase, now, 0.0

    def _fold(self, seconds: float) -> None:
        if self._thoughts == "show":
            self._screen.draw([], above=self._shown_thoughts.closed(self._screen.width, final=True))
        how = "(/thoughts last)" if self._interactive and self._thoughts != "show" else ""
        tokens = self._reply.stats.thinking_tokens if self._reply is not None else 0
        summary = f"Thought for {duration(seconds)}, {count(tokens)} tok {how}".rstrip()
        self._print([Styled(summary, "thought"), Styled()])

    def _print(self, lines: list[Styled]) -> None:
        width = self._screen.width
        wrapped = [row for line in lines for row in self._layout.wrap(line, width)]
        self._screen.draw([], above=self._layout.ansi(wrapped))

    def _draw(self) -> None:
        """Show the present picture, at most as often as a tenth of the time spent on drawing allows."""
        began = time.monotonic()
        if began < self._next_draw or self._phase == "done":
            return
        above, live = self._picture(self._screen.width, self._screen.height - 1)
        self._screen.draw(live, above)
        spent = time.monotonic() - began
        self._next_draw = time.monotonic() + min(_SLOWEST_S, max(_FASTEST_S, 9 * spent))

    def _picture(self, width: int, rows: int) -> tuple[list[str], list[str]]:
        """Lines to print for good, and the live ones: fewer than `rows` with room for the status line."""
        if self._phase == "prompt":
            return [], self._waiting(width)
        if self._phase == "think":
            return self._thinking(width, rows)
        if not self._stream:
            return [], self._quiet(f"Answering… ({count(self._answer_tokens())} tok){self._stop_note()}", width)
        if self._raw:
            return [], []
        status = self._quiet("Stopping…", width) if self._stopping else []
        above, live = _flow(self._answer, width, rows - len(status))
        return above, live + status

    def _waiting(self, width: int) -> list[str]:
        now = time.monotonic()
        if now - self._began < QUIET_S:
            return []
        if self._prefill is None:
            return self._quiet(f"Reading the prompt… {duration(now - self._began)}{self._stop_note()}", width)
        began, start = self._prefill_start
        label = "Stopping… reading" if self._stopping else "Reading the prompt"
        return self._quiet(progress_line(label, self._prefill, now - began, start, width), width)

    def _thinking(self, width: int, rows: int) -> tuple[list[str], list[str]]:
        tokens = self._reply.stats.thinking_tokens if self._reply is not None else 0
        hint = " Ctrl-T: answer now" if self._interactive and not self._stopping else ""
        head = f"Thinking… ({count(tokens)} tok, {duration(time.monotonic() - self._phase_began)}){self._stop_note()}"
        status = self._quiet(head + hint if len(head + hint) <= width else head, width, "thought")
        if self._thoughts == "show":
            above, live = _flow(self._shown_thoughts, width, rows - 1)
            return above, live + status
        if self._thoughts == "hide":
            return [], status
        room = min(_TAIL_ROWS, rows - 1)
        tail = Styled(self._thought.strip("\n")[-room * width :], "thought")
        return [], status + self._layout.ansi(self._layout.wrap(tail, width)[-room:])

    def _quiet(self, text: str, width: int, style: str = "quiet") -> list[str]:
        line = Styled(text, style)
        line.truncate(width)
        return self._layout.ansi([line])

    def _stop_note(self) -> str:
        return " Stopping…" if self._stopping else ""

    def _answer_tokens(self) -> int:
        return self._reply.stats.answer_tokens if self._reply is not None else 0


def _flow(stream: MarkdownStream | PlainStream, width: int, rows: int) -> tuple[list[str], list[str]]:
    """What has become final or finds no place among `rows` live lines, and the rest."""
    above = stream.closed(width)
    live = stream.open(width)
    over = max(0, len(live) - max(rows, 1))
    stream.push(over)
    return above + live[:over], live[over:]
