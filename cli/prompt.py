"""The line where people type: history, several lines, pastes, completion."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus, is_done
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output

from cli.output import plural

FENCE = '"""'
PASTE_LINES, PASTE_CHARACTERS = 15, 1000
_PLACEHOLDER = re.compile(r"\[[^\[\]]* #\d+, \d+ lines?\]")


class Pastes:
    """Long texts that the input line shows as `[Pasted text #1, 84 lines]`."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def collapse(self, text: str, name: str = "Pasted text", *, always: bool = False) -> str:
        """The placeholder of a long text; a short one stays itself."""
        lines = text.count("\n") + (not text.endswith("\n"))
        if not always and lines <= PASTE_LINES and len(text) <= PASTE_CHARACTERS:
            return text
        name = re.sub(r"[\[\]]", "", name)
        placeholder = f"[{name} #{len(self._texts) + 1}, {plural(lines, 'line')}]"
        self._texts[placeholder] = text
        return placeholder

    def expand(self, text: str) -> str:
        return _PLACEHOLDER.sub(lambda match: self._texts.get(match[0], match[0]), text)


class _ExpandingFileHistory(FileHistory):
    """Remembers what was sent, not the placeholders it was typed with."""

    def __init__(self, path: Path, pastes: Pastes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
        self._pastes = pastes
        super().__init__(str(path))

    def append_string(self, string: str) -> None:
        super().append_string(self._pastes.expand(string))


class _Completer(Completer):
    """/commands, their words (PATH: a file; SESSION: one of `sessions`), and any word that looks like a path."""

    def __init__(self, commands: Mapping[str, Iterable[str]], sessions: Callable[[], Iterable[str]]) -> None:
        self._commands = commands
        self._sessions = sessions
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        word = before.split()[-1] if before and not before[-1].isspace() else ""
        if before.startswith("/") and " " not in before and "/" not in before[1:]:
            names = [name for name in self._commands if name.startswith(before)]
            yield from (Completion(name, -len(before)) for name in names)
            return
        command = before.split(maxsplit=1)[0] if before.startswith("/") else ""
        words = tuple(self._commands.get(command, ()))
        choices = [*self._sessions()] if "SESSION" in words else [choice for choice in words if choice.islower()]
        yield from (Completion(choice, -len(word)) for choice in choices if choice.startswith(word))
        if word.startswith(("/", "./", "../", "~")) or "PATH" in words:
            yield from self._paths.get_completions(Document(word), event)


class Prompt:
    """Reads one message at a time; `commands` maps each /command to its words, `sessions` gives what /load may name."""

    def __init__(
        self,
        commands: Mapping[str, Iterable[str]],
        history: Path | None = None,
        *,
        sessions: Callable[[], Iterable[str]] = tuple,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self.pastes = Pastes()
        self._multiline = False
        past: History = _ExpandingFileHistory(history, self.pastes) if history else InMemoryHistory()
        is_command = Condition(lambda: get_app().current_buffer.text.startswith("/"))
        self._session: PromptSession[str] = PromptSession(
            [("ansicyan bold", "> ")],
            history=past,
            completer=_Completer(commands, sessions),
            multiline=True,
            complete_while_typing=is_command & ~is_done,
            enable_suspend=True,
            prompt_continuation=[("", "  ")],
            key_bindings=self._keys(),
            reserve_space_for_menu=6,
            input=input,
            output=output,
        )

    def read(self, default: str = "", *, multiline: bool = False) -> str:
        """The next message, pastes in full. EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C on an empty line."""
        self._multiline = multiline
        text = self.pastes.expand(self._session.prompt(default=default))
        return unfenced(text)

    def type_ahead(self, typed: str) -> None:
        """Deliver keys that were pressed while there was no prompt."""
        keys: list[KeyPress] = []
        parser = Vt100Parser(keys.append)
        parser.feed(typed)
        parser.flush()
        store_typeahead(self._session.input, [key for key in keys if key.key != Keys.CPRResponse])

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        typing = has_focus(DEFAULT_BUFFER)

        @keys.add("enter", filter=typing)
        def send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if self._multiline or is_open(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=typing)
        def newline_or_send(event: KeyPressEvent) -> None:
            if self._multiline:
                event.current_buffer.validate_and_handle()
            else:
                event.current_buffer.insert_text("\n")

        @keys.add("c-j", filter=typing)
        def newline(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c", filter=typing)
        @keys.add("<sigint>")
        def clear_or_interrupt(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt)

        @keys.add("c-x", "c-e", filter=typing)
        @keys.add("c-g", filter=typing)
        def edit(event: KeyPressEvent) -> None:
            self._edit(event.current_buffer)

        @keys.add(Keys.BracketedPaste, filter=typing)
        def paste(event: KeyPressEvent) -> None:
            text = event.data.replace("\r\n", "\n").replace("\r", "\n")
            event.current_buffer.insert_text(self.pastes.collapse(text))

        return keys

    def _edit(self, buffer: Buffer) -> None:
        buffer.text = self.pastes.expand(buffer.text)
        buffer.open_in_editor()


def is_open(text: str) -> bool:
    '''Whether a """ block was begun and not ended.'''
    stripped = text.strip()
    return stripped.startswith(FENCE) and not (len(stripped) >= 2 * len(FENCE) and stripped.endswith(FENCE))


def unfenced(text: str) -> str:
    '''The message inside """ marks, or the text itself.'''
    stripped = text.strip()
    if stripped.startswith(FENCE) and not is_open(stripped):
        return stripped[len(FENCE) : -len(FENCE)].strip("\n")
    return text


class DoublePress:
    """Ctrl-C on an empty line twice within `seconds` means to leave."""

    def __init__(self, seconds: float = 2.0) -> None:
        self._seconds = seconds
        self._last = float("-inf")

    def again(self) -> bool:
        now = time.monotonic()
        last, self._last = self._last, now
        return now - last <= self._seconds
