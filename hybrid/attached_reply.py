"""An answer that a server makes: its events read as the parts, figures and message that `hybrid.reply.Reply` has."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from hybrid.chat.message import Message, Part, Text, Think, ToolCall
from hybrid.errors import KimiError
from hybrid.progress import OnProgress, Progress
from hybrid.stats import Stats

DATA = b"data:"


class Source(Protocol):
    """The connection that the answer comes over."""

    gone: Callable[[], KimiError]

    def lines(self) -> Iterator[bytes]: ...

    def cut(self) -> None: ...

    def close(self) -> None: ...


class AttachedReply:
    """Iterate for Think, Text and ToolCall parts. `stop` and `answer_now` may be called from anywhere, any time."""

    def __init__(
        self,
        source: Source,
        hurry: Callable[[str], None],
        figures: Callable[[str], dict[str, Any]],
        limits: tuple[int, int],
        on_progress: OnProgress,
    ) -> None:
        """`hurry` ends the reasoning of the answer with the given id, `figures` tells what the server measured of it,
        by the names of `Stats`; `limits` in tokens, of the answer and of all."""
        self._source = source
        self._events = _events(source)
        self._hurry, self._figures = hurry, figures
        self._max_tokens, self._ctx = limits
        self._report = on_progress
        self._id = ""
        self._finish = ""  # in the server's words
        self._parts: deque[Part] = deque()
        self._given: list[Part] = []
        self._calls: dict[int, ToolCall] = {}
        self._stopped = self._over = False
        self._began, self._first = time.perf_counter(), 0.0
        self.finish_reason = ""
        self.stats = Stats()

    def __iter__(self) -> Iterator[Part]:
        return self

    def __next__(self) -> Part:
        while not self._parts and not self._over:
            self._advance()
        if not self._parts:
            raise StopIteration
        self._given.append(self._parts.popleft())
        return self._given[-1]

    def stop(self) -> None:
        """Close the connection: the server ends the answer then."""
        self._stopped = True
        self._source.cut()

    def answer_now(self) -> None:
        """Close the reasoning, if there is any. Raises KimiError where the server cannot."""
        if self._id and not self._over:
            self._hurry(self._id)

    @property
    def message(self) -> Message:
        """The assistant's turn so far."""
        return Message.from_parts(self._given, interrupted=self.finish_reason == "interrupted")

    def _advance(self) -> None:
        """Take one event, or notice that there are no more. Raises KimiError if that is no end."""
        try:
            event = next(self._events, None)
        except KimiError:
            if not self._stopped:
                self._end("interrupted")
                raise
            event = None
        if event is None and not self._finish and not self._stopped:
            self._end("interrupted")
            raise self._source.gone()
        if event is None:
            self._release_calls()
            self._end(self._reason())
            self._learn()
            return
        self._take(event)

    def _end(self, reason: str) -> None:
        self._over = True
        self.finish_reason = reason
        self._source.close()

    def _learn(self) -> None:
        """Take over what only the server could measure, or did better; the first token counts when it is here."""
        told = self._figures(self._id) if self._id else {}
        if told.get("first_token_s"):
            names = vars(self.stats).keys() & told.keys() - {"first_token_s"}
            vars(self.stats).update({name: told[name] for name in names})

    def _reason(self) -> str:
        """The server's reason in ours: it calls too long whatever was cut off, also by its own end."""
        if self._finish != "length":
            return self._finish or "interrupted"
        made = self.stats.generated_tokens
        if made >= self._max_tokens:
            return "length"
        return "context" if self.stats.prompt_tokens + made >= self._ctx - 1 else "interrupted"

    def _take(self, event: dict[str, Any]) -> None:
        if error := event.get("error"):
            self._end("interrupted")
            raise KimiError(str(error.get("message")))
        self._id = event.get("id", self._id)
        if progress := event.get("prompt_progress"):
            self._note_prefill(progress)
        for choice in event.get("choices") or ():
            self._take_delta(choice.get("delta") or {})
            if reason := choice.get("finish_reason"):
                self._release_calls()
                self._finish = reason
        self._note_figures(event.get("usage"), event.get("timings"))

    def _take_delta(self, delta: dict[str, Any]) -> None:
        for key, kind in (("reasoning_content", Think), ("content", Text)):
            if text := delta.get(key):
                self._release_calls()
                self._note_token(kind is Think)
                self._parts.append(kind(text))
        for piece in delta.get("tool_calls") or ():
            self._note_token(False)
            self._add_to_call(piece)

    def _add_to_call(self, piece: dict[str, Any]) -> None:
        index, function = piece.get("index", 0), piece.get("function") or {}
        known = self._calls.get(index) or ToolCall(piece.get("id", ""), function.get("name", ""), "")
        self._calls[index] = ToolCall(known.id, known.name, known.arguments + function.get("arguments", ""))

    def _release_calls(self) -> None:
        """Calls come out whole; one that was cut off is text, as it is for those who do not follow its writing."""
        for call in self._calls.values():
            self._parts.append(call if _is_json(call.arguments) else Text(f"\n{call.id} {call.arguments}"))
        self._calls.clear()

    def _note_token(self, thinking: bool) -> None:
        """Count what comes, until the server tells how many it were."""
        now = time.perf_counter()
        if not self._first:
            self._first = now
            self.stats.first_token_s = now - self._began
        self.stats.decode_s = now - self._first
        if thinking:
            self.stats.thinking_tokens += 1
        else:
            self.stats.answer_tokens += 1

    def _note_prefill(self, progress: dict[str, Any]) -> None:
        stats = self.stats
        stats.prompt_tokens, stats.cached_tokens = progress["total"], progress["cache"]
        stats.prefill_s = progress["time_ms"] / 1000
        self._report(Progress("prefill", progress["processed"], progress["total"], "tok"))

    def _note_figures(self, usage: dict[str, Any] | None, timings: dict[str, Any] | None) -> None:
        stats = self.stats
        if timings:
            stats.prefill_s, stats.decode_s = timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000
        if usage:
            stats.prompt_tokens = usage["prompt_tokens"]
            stats.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
            stats.thinking_tokens = usage["completion_tokens_details"]["reasoning_tokens"]
            stats.answer_tokens = usage["completion_tokens"] - stats.thinking_tokens


def _events(source: Source) -> Iterator[dict[str, Any]]:
    """The server-sent events; comments, which only keep the connection alive, are left out."""
    for line in source.lines():
        data = line[len(DATA) :].strip() if line.startswith(DATA) else b""
        if data == b"[DONE]":
            return
        if data:
            try:
                yield json.loads(data)
            except ValueError:
                return  # cut off in the middle of a line


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
