"""One reply from question to answer: the engine on this thread, the clock and the keys on two others."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cli.keys import CTRL_T, Keyboard, on_interrupt
from cli.screen import ticking
from cli.views import View
from hybrid.errors import KimiError

if TYPE_CHECKING:
    from cli.model import Reply
    from hybrid.chat.message import Message
    from hybrid.progress import OnProgress
    from hybrid.stats import Stats


@dataclass(frozen=True)
class Turn:
    """A finished reply; times in seconds."""

    message: Message
    finish_reason: str
    stats: Stats
    thought_s: float
    total_s: float
    notice: str = ""  # what could not be done meanwhile
    failure: KimiError | None = None  # what cut it off, if it was not the user

    @property
    def is_empty(self) -> bool:
        """Stopped before the first token: nothing to keep."""
        message = self.message
        return not (message.content or message.reasoning_content or message.tool_calls)


def run_turn(start: Callable[[OnProgress], Reply], view: View, keyboard: Keyboard | None = None) -> Turn:
    """Iterate the reply that `start(on_progress)` opens and show it; Ctrl-C stops it, Ctrl-T ends its reasoning.

    An answer that fails on the way is one that was interrupted. Raises what comes before its first part
    (ContextExceeded before anything is computed).
    """
    live = _LiveReply(view)
    began, failure = time.perf_counter(), None
    try:
        with on_interrupt(live.stop), ticking(view.tick):
            reply = live.open(start(view.progress))
            with keyboard.listening({CTRL_T: live.answer_now}) if keyboard else nullcontext():
                try:
                    for part in reply:
                        live.note(part)
                        view.part(part)
                except KimiError as error:
                    failure = error
    finally:
        view.finish()
    message = replace(reply.message, interrupted=True) if failure else reply.message
    why = "interrupted" if failure else reply.finish_reason
    turn = Turn(message, why, reply.stats, live.thought_s, time.perf_counter() - began, live.notice, failure)
    if failure is not None and turn.is_empty:
        raise failure
    return turn


class _LiveReply:
    """What signals and keys may do to a reply at any moment, also before it exists."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._reply: Reply | None = None
        self._stopped = False
        self._thinking_since: float | None = None
        self.thought_s = 0.0
        self.notice = ""

    def open(self, reply: Reply) -> Reply:
        self._reply = reply
        self._view.begin(reply)
        if self._stopped:
            reply.stop()
        return reply

    def stop(self) -> None:
        self._stopped = True
        self._view.stopping()
        if self._reply is not None:
            self._reply.stop()

    def answer_now(self) -> None:
        try:
            if self._reply is not None:
                self._reply.answer_now()
        except KimiError as error:  # on the keyboard's thread: told when the answer has ended
            self.notice = str(error)

    def note(self, part: object) -> None:
        from hybrid.chat.message import Think

        now = time.perf_counter()
        if isinstance(part, Think):
            self._thinking_since = self._thinking_since or now
            self.thought_s = now - self._thinking_since
        else:
            self._thinking_since = None
