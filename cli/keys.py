"""The keyboard while no prompt is shown: keys act at once, everything else is kept for the next prompt.

From the first line of an interactive chat to its last the terminal neither echoes nor edits lines (the prompt brings
its own editing); Ctrl-C and Ctrl-Z stay signals. Pasted text arrives bracketed also while an answer is being written.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import TextIO

from cli.output import is_drawable

CTRL_T = "\x14"
_PASTE_ON, _PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"
_RESTORE = "\x1b[?7h\x1b[?25h" + _PASTE_OFF  # wrapping on, cursor visible


class Keyboard:
    """A context: the terminal is as it was before when it ends, however it ends."""

    def __init__(self, stdin: TextIO = sys.stdin, stdout: TextIO = sys.stdout) -> None:
        self._fd = stdin.fileno()
        self._stdout = stdout
        self._drawable = is_drawable(stdout)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._typed = ""

    def __enter__(self) -> Keyboard:
        self._before = termios.tcgetattr(self._fd)
        self._take_over()
        return self

    def _take_over(self) -> None:
        flags = termios.tcgetattr(self._fd)
        flags[0] &= ~termios.ICRNL  # Enter and Ctrl-J stay different keys
        flags[3] &= ~(termios.ICANON | termios.ECHO)
        flags[3] |= termios.NOFLSH  # Ctrl-C does not throw away what was typed ahead
        termios.tcsetattr(self._fd, termios.TCSANOW, flags)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError, termios.error):  # the terminal may be gone (SIGHUP)
            termios.tcsetattr(self._fd, termios.TCSANOW, self._before)
            self._write(_RESTORE)

    @contextlib.contextmanager
    def listening(self, actions: Mapping[str, Callable[[], None]]) -> Iterator[None]:
        """Read keys on a thread: those in `actions` call their function there, the rest waits for `take_typed`."""
        self._take_over()
        wake, waker = os.pipe()
        thread = threading.Thread(target=self._listen, args=(wake, actions), name="keyboard", daemon=True)
        self._write(_PASTE_ON)
        thread.start()
        # after Ctrl-Z and fg: the shell has set the terminal as it likes it
        before = signal.signal(signal.SIGCONT, lambda *_: self._take_over())
        try:
            yield
        finally:
            signal.signal(signal.SIGCONT, before)
            os.write(waker, b"x")
            thread.join()
            os.close(wake)
            os.close(waker)

    def _write(self, sequence: str) -> None:
        if self._drawable:
            self._stdout.write(sequence)
            self._stdout.flush()

    def take_typed(self) -> str:
        """What was typed ahead since the last call, as the terminal sent it."""
        typed, self._typed = self._typed, ""
        return typed

    def _listen(self, wake: int, actions: Mapping[str, Callable[[], None]]) -> None:
        while wake not in (ready := select.select([self._fd, wake], [], [])[0]):
            data = os.read(self._fd, 4096) if self._fd in ready else b""
            if not data:  # the terminal is gone
                return
            self._sort(self._decoder.decode(data), actions)

    def _sort(self, text: str, actions: Mapping[str, Callable[[], None]]) -> None:
        for character in text:
            if character in actions:
                actions[character]()
            else:
                self._typed += character


@contextlib.contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop` instead of raising KeyboardInterrupt."""

    def note(signum: int, frame: FrameType | None) -> None:
        stop()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def leaving_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the block with KeyboardInterrupt, also where a library swallows it or stumbles over it.

    Imports cut short by it are known to fail later and elsewhere, with errors that mean nothing to anybody.
    """
    pressed = False

    def leave(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            raise KeyboardInterrupt from None


@contextlib.contextmanager
def exiting_on_kill() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program by SystemExit, so that the terminal is restored on the way out."""

    def leave(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
