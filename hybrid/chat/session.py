"""Conversations on disk: one JSON file each, readable by its owner only."""

import json
import os
import re
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hybrid.chat.message import Message
from hybrid.errors import KimiError

VERSION = 1
TITLE_LETTERS = 60
ID = re.compile(r"[0-9A-Za-z_-]{1,100}")


@dataclass
class Session:
    """A conversation with `model`. `settings` is the front end's own (JSON values); times are ISO 8601 in UTC."""

    id: str
    model: str
    created: str
    title: str = ""
    updated: str = ""
    messages: list[Message] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values that `from_dict` understands."""
        messages = [message.to_dict() for message in self.messages]
        return {"version": VERSION, **vars(self), "messages": messages}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Session":
        """The inverse of `to_dict`; keys it does not know are ignored. Raises ValueError or KimiError."""
        texts = {key: values.get(key, "") for key in ("id", "model", "created", "title", "updated")}
        messages, settings = values.get("messages"), values.get("settings", {})
        if not all(isinstance(text, str) for text in texts.values()) or not ID.fullmatch(texts["id"]):
            raise ValueError("not a session")
        if not isinstance(messages, list) or not isinstance(settings, dict):
            raise ValueError("a session without messages")
        return cls(**texts, messages=[Message.from_dict(message) for message in messages], settings=settings)


class SessionStore:
    """The sessions in `directory`, which is made when the first one is saved."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def new(self, model: str) -> Session:
        """A session that is not on disk yet. Its id begins with the time, so ids sort by age."""
        now = datetime.now(UTC)
        return Session(f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}", model, _stamp(now))

    def save(self, session: Session) -> None:
        """Write the whole session, or leave the file as it was. An empty title becomes the first question's first line.

        Raises KimiError when the disk refuses.
        """
        session.title = session.title or _first_line(session.messages)
        session.updated = _stamp(datetime.now(UTC))
        text = json.dumps(session.to_dict(), ensure_ascii=False, indent=1) + "\n"
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_atomically(self._path(session.id), text.encode("utf-8", "surrogatepass"))
        except OSError as error:
            remedy = "Free some space or choose another place for sessions."
            raise KimiError(f"Conversations cannot be saved in {self.directory}: {error.strerror}.", remedy) from error

    def load(self, id_or_name: str) -> Session:
        """The session with this id, else the one with this title, else the one whose id begins so.

        Raises KimiError when there is none, when several fit, and when its file is damaged.
        """
        if ID.fullmatch(id_or_name) and self._path(id_or_name).exists():
            return _read(self._path(id_or_name))
        sessions = self.list()
        named = [session for session in sessions if session.title.casefold() == id_or_name.casefold()]
        found = named or [session for session in sessions if id_or_name and session.id.startswith(id_or_name)]
        if not found:
            raise KimiError(f"There is no session {id_or_name!r} in {self.directory}.", "See the list of sessions.")
        if len(found) > 1:
            ids = ", ".join(session.id for session in found)
            raise KimiError(f"{len(found)} sessions fit {id_or_name!r}: {ids}.", "Use the id of one.")
        return found[0]

    def latest(self) -> Session | None:
        """The session saved last; None if there is none that can be read."""
        return next(iter(self.list()), None)

    def list(self) -> Sequence[Session]:
        """All sessions that can be read, the one saved last first. Damaged files are in `damaged`."""
        sessions = [session for path in self._files() if (session := _try_read(path))]
        return sorted(sessions, key=lambda session: (session.updated, session.id), reverse=True)

    def damaged(self) -> Sequence[Path]:
        """The session files that cannot be read."""
        return [path for path in self._files() if _try_read(path) is None]

    def remove(self, session_id: str) -> None:
        """Delete one session's file, also a damaged one. Raises KimiError when there is none of this id."""
        path = self._path(session_id) if ID.fullmatch(session_id) else None
        if path is None or not path.exists():
            raise KimiError(f"There is no session {session_id!r} in {self.directory}.", "See the list of sessions.")
        try:
            path.unlink()
        except OSError as error:
            raise KimiError(f"{path} cannot be deleted: {error.strerror}.") from error

    def _files(self) -> Sequence[Path]:
        return sorted(path for path in self.directory.glob("*.json") if ID.fullmatch(path.stem))

    def _path(self, session_id: str) -> Path:
        return self.directory / f"{session_id}.json"


def _read(path: Path) -> Session:
    remedy = "The other sessions are not affected; delete this file or bring it back from a copy."
    try:
        values = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
        if not isinstance(values, dict) or values.get("version") != VERSION or values.get("id") != path.stem:
            raise ValueError("it is not a session of this version")
        return Session.from_dict(values)
    except (OSError, ValueError, KimiError, RecursionError) as error:
        why = error.message if isinstance(error, KimiError) else str(error)
        raise KimiError(f"The session file {path} cannot be read: {why.rstrip('.')}.", remedy) from error


def _try_read(path: Path) -> Session | None:
    try:
        return _read(path)
    except KimiError:
        return None


def _write_atomically(path: Path, data: bytes) -> None:
    """A new file with mode 0600 takes the place of `path` only when it is completely on disk."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _first_line(messages: list[Message]) -> str:
    question = next((message.content for message in messages if message.role == "user" and message.content.strip()), "")
    line = question.strip().partition("\n")[0].strip()
    return line if len(line) <= TITLE_LETTERS else line[: TITLE_LETTERS - 1].rstrip() + "…"


def _stamp(time: datetime) -> str:
    return time.isoformat(timespec="microseconds")
