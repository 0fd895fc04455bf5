"""How a reply appears where nothing can be redrawn: in a pipe, a file, or as JSON.

Every view has the same five methods (`View`); `cli.live.LiveView` is the one for terminals. Views know nothing of the
engine: they see progress, parts and the reply's counters.
"""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from cli.output import duration, printable
from cli.screen import Screen, bar_line, progress_figures

if TYPE_CHECKING:
    from cli.markdown import MarkdownStream
    from cli.model import Reply
    from hybrid.chat.message import Part
    from hybrid.progress import Progress

QUIET_S = 1.0  # a wait shorter than this needs no bar


class View(Protocol):
    def begin(self, reply: Reply) -> None:
        """The request is accepted; `reply.stats` is live from here on."""

    def progress(self, progress: Progress) -> None: ...

    def part(self, part: Part) -> None: ...

    def stopping(self) -> None:
        """Ctrl-C was pressed. Called from a signal: may only note it."""

    def tick(self) -> None:
        """Called about five times a second from another thread."""

    def finish(self) -> None:
        """Nothing more comes, whatever the reason."""


class SilentView:
    """Shows nothing: `--json` prints one object when all is done."""

    def begin(self, reply: Reply) -> None:
        pass

    def progress(self, progress: Progress) -> None:
        pass

    def part(self, part: Part) -> None:
        pass

    def stopping(self) -> None:
        pass

    def tick(self) -> None:
        pass

    def finish(self) -> None:
        pass


class JsonLinesView(SilentView):
    """One JSON object per delta (`--stream-json`): {"type": "reasoning"|"text"|"tool_call", ...}."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def part(self, part: Part) -> None:
        write_json(self._out, part_to_dict(part))


def part_to_dict(part: Part) -> dict[str, Any]:
    """{"type": "reasoning"|"text", "text"} or {"type": "tool_call", "id", "name", "arguments"}."""
    from hybrid.chat.message import Text, Think

    if isinstance(part, Think | Text):
        return {"type": "reasoning" if isinstance(part, Think) else "text", "text": part.text}
    return {"type": "tool_call", "id": part.id, "name": part.name, "arguments": part.arguments}


def write_json(out: TextIO, value: dict[str, Any]) -> None:
    out.write(json.dumps(value, ensure_ascii=False) + "\n")
    out.flush()


class PipeView(SilentView):
    """The answer to `out`, untouched, as it comes; reasoning and progress to `err`.

    With `markdown` (colour was forced) the answer is laid out block by block instead.
    """

    def __init__(
        self,
        out: TextIO,
        err: TextIO,
        *,
        thoughts: bool,
        quiet: bool,
        stream: bool = True,
        width: int = 80,
        markdown: MarkdownStream | None = None,
    ) -> None:
        self._out, self._err = out, err
        self._thoughts, self._stream, self._width, self._markdown = thoughts, stream, width, markdown
        self._answer = ""
        self._last_thought = ""
        self._status = StatusLine(err) if err.isatty() and not quiet else None

    def progress(self, progress: Progress) -> None:
        if self._status is not None:
            self._status.show("Reading the prompt", progress)

    def tick(self) -> None:
        if self._status is not None:
            self._status.tick()

    def part(self, part: Part) -> None:
        from hybrid.chat.message import Text, Think

        if self._status is not None:
            self._status.clear()
        if isinstance(part, Think):
            self._think(part.text)
        elif isinstance(part, Text):
            self._end_thoughts()
            self._write(part.text)

    def finish(self) -> None:
        if self._status is not None:
            self._status.clear()
        self._end_thoughts()
        if self._markdown is not None:
            self._lines(self._markdown.closed(self._width, final=True))
            return
        text = "" if self._stream else self._answer
        if self._answer and not self._answer.endswith("\n"):
            text += "\n"
        self._emit(text)

    def _think(self, text: str) -> None:
        if self._thoughts:
            self._last_thought = text or self._last_thought
            self._err.write(printable(text) if self._err.isatty() else text)
            self._err.flush()

    def _end_thoughts(self) -> None:
        if self._last_thought:
            self._err.write("\n" if self._last_thought.endswith("\n") else "\n\n")
            self._err.flush()
            self._last_thought = ""

    def _write(self, text: str) -> None:
        self._answer += text
        if self._markdown is not None:
            self._markdown.feed(printable(text))
            self._lines(self._markdown.closed(self._width) if self._stream else [])
        elif self._stream:
            self._emit(text)

    def _lines(self, lines: list[str]) -> None:
        self._emit("".join(f"{line}\n" for line in lines))

    def _emit(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class StatusLine:
    """One line on a terminal that tells how far a job is, from its second second on."""

    def __init__(self, stream: TextIO) -> None:
        self._screen = Screen(stream)
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._label = ""
        self._progress: Progress | None = None
        self._first = (0.0, 0)  # when the first report of this stage came, and how much was done then
        self._off = False

    def show(self, label: str, progress: Progress | None = None) -> None:
        """The job now goes by `label`; without `progress` only the time passes."""
        with self._lock:
            if self._label != label:
                self._label, self._first = label, (time.monotonic(), progress.done if progress else 0)
            self._progress = progress
            self._draw()

    def tick(self) -> None:
        with self._lock:
            self._draw()

    def clear(self) -> None:
        """Remove the line; it does not come back."""
        with self._lock:
            self._off = True
            self._screen.clear()

    def _draw(self) -> None:
        now = time.monotonic()
        if self._off or not self._label or now - self._began < QUIET_S:
            return
        began, start = self._first
        self._screen.draw([progress_line(self._label, self._progress, now - began, start, self._screen.width)])


def progress_line(label: str, progress: Progress | None, elapsed: float, start: int, width: int) -> str:
    """Label, bar, amounts, time left and rate, as far as `width` allows; only the time where amounts say nothing."""
    if progress is None or progress.total <= 1:
        return f"{label}… {duration(elapsed)}"[:width]
    figures = progress_figures(progress.done, progress.total, progress.unit, elapsed, start)
    return bar_line(label, progress.done, progress.total, figures, width)
