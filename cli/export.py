"""Conversations as files for people (Markdown) and programs (JSON)."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.errors import UsageError

if TYPE_CHECKING:
    from hybrid.chat.session import Session

_SPEAKERS = {"system": "System", "user": "You", "tool": "Tool"}


def export(session: Session, model: str, name: str = "") -> Path:
    """Write `session` to `name`, or to a file named after its title; returns the path. Raises UsageError, OSError."""
    path = Path(name).expanduser() if name else Path(f"{slug(session.title or session.id)}.md")
    if path.suffix not in (".md", ".json"):
        raise UsageError(f"{path.name} says no format.", "Choose a name that ends in .md or .json.")
    text = to_json(session, model) if path.suffix == ".json" else to_markdown(session, model)
    write_atomically(path, text)
    return path


def slug(title: str) -> str:
    """A file name from a title: letters, digits and dashes."""
    return re.sub(r"[^\w]+", "-", title.lower()).strip("-")[:60] or "conversation"


def to_json(session: Session, model: str) -> str:
    messages = [message.to_dict() for message in session.messages]
    value = {"model": model, "title": session.title, "created": session.created, "messages": messages}
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def to_markdown(session: Session, model: str) -> str:
    blocks = [f"# {session.title or 'Conversation'}", f"{model}, {session.created[:10]}"]
    for message in session.messages:
        mark = " (interrupted)" if message.interrupted else ""
        blocks.append(f"## {_SPEAKERS.get(message.role, model)}{mark}")
        if message.reasoning_content:
            thoughts = message.reasoning_content.strip().replace("\n", "\n> ")
            blocks.append(f"> {thoughts}")
        blocks.append(message.content.strip())
    return "\n\n".join(block for block in blocks if block) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """The file is there completely or not at all. Raises OSError."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
