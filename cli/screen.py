"""The last lines of a terminal, redrawn in place; whatever is printed above them is ordinary scrollback."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from cli.output import count, duration, rate

_SGR = re.compile(r"\x1b\[[0-9;]*m")
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"
_ERASE_LINE, _ERASE_BELOW = "\x1b[K", "\x1b[J"  # from the cursor on


class Screen:
    """Owns the live lines at the bottom of a terminal.

    Every live line takes exactly one row: the terminal's own wrapping is off while one is written, so a character
    whose width terminal and program judge differently cannot shift the rows below. Only lines from the first changed
    one downwards are written again.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._live: list[str] = []
        self._width = self.width

    @property
    def width(self) -> int:
        return max(1, shutil.get_terminal_size().columns)

    @property
    def height(self) -> int:
        return max(2, shutil.get_terminal_size().lines)

    def draw(self, live: Sequence[str], above: Sequence[str] = ()) -> None:
        """Print the lines `above` for good, then show `live` (fewer lines than the screen is high) below them."""
        resized = self.width != self._width
        if not above and not resized and self._live == list(live):
            return
        keep = 0 if above or resized else _common(self._live, live)
        rows = sum(map(self._rows, self._live[keep:]))
        fresh = live[keep:]
        text = self._start_of(keep, rows)
        text += "".join(f"{_ERASE_LINE}{line}\r\n" for line in above)
        text += _NO_WRAP + "\r\n".join(_ERASE_LINE + line for line in fresh) + _WRAP
        if rows > len(above) + len(fresh):
            text += f"\r\n{_ERASE_BELOW}\x1b[A" if fresh else _ERASE_BELOW if rows > 1 else _ERASE_LINE
        self._width = self.width
        self._live = list(live)
        self._stream.write(text)
        self._stream.flush()

    def clear(self) -> None:
        """Remove the live lines."""
        self.draw([])

    def _start_of(self, keep: int, rows: int) -> str:
        """Bytes that bring the cursor to the start of live line `keep`, `rows` rows above the end of the last one."""
        if keep == len(self._live):
            return "\r\n" if keep else ""
        return f"\r\x1b[{rows - 1}A" if rows > 1 else "\r"

    def _rows(self, line: str) -> int:
        """Rows a line takes now: terminals re-wrap what no longer fits after they were made narrower."""
        width = self.width
        if width >= self._width:
            return 1
        from rich.cells import cell_len

        return max(1, -(-cell_len(_SGR.sub("", line)) // width))


def _common(old: Sequence[str], new: Sequence[str]) -> int:
    """Number of leading lines that stay; a shorter picture is redrawn from its last line on."""
    same = 0
    for before, after in zip(old, new, strict=False):
        if before != after:
            break
        same += 1
    return same if len(new) > same or len(old) == same else max(0, same - 1)


@contextmanager
def ticking(tick: Callable[[], None], interval: float = 0.2) -> Iterator[None]:
    """Call `tick` regularly from another thread: time goes on while the engine computes."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(interval):
            tick()

    thread = threading.Thread(target=run, name="ticking", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def bar_line(label: str, done: int, total: int, figures: Sequence[str], width: int) -> str:
    """`label ━━━━──── figures`; what the width does not allow is left out, the last figures first, then the bar."""
    figures = list(figures)
    while figures and len(label) + 1 + len(" · ".join(figures)) > width:
        figures.pop()
    text = " · ".join(figures)
    room = width - len(label) - len(text) - 3
    if total <= 0 or room < 6:
        return f"{label} {text}".rstrip()[:width]
    cells = min(24, room)
    full = min(cells, round(cells * done / total))
    return f"{label} {'━' * full}{'─' * (cells - full)} {text}".rstrip()


def progress_figures(done: int, total: int, unit: str, elapsed: float, start: int = 0) -> list[str]:
    """Amounts, rate and time left of a job that was at `start` when the clock began."""
    per_second = (done - start) / max(elapsed, 1e-9)
    if unit in ("B", "bytes"):
        amount, speed = f"{done / 1e9:.1f}/{total / 1e9:.1f} GB", f"{per_second / 1e9:.1f} GB/s"
    else:
        amount, speed = f"{count(done)}/{count(total)} {unit}".rstrip(), f"{rate(per_second)} {unit}/s" if unit else ""
    if done <= start or elapsed < 0.2:
        return [amount]
    left = duration((total - done) * elapsed / (done - start))
    return [amount, f"{left} left", speed] if speed else [amount, f"{left} left"]
