"""The lines of a job: OpenAI's batch format, the short forms {"messages"} and {"prompt"}, or plain text.

Everything that can be said about a line without a model is said here, before one is loaded.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrid.batch.body import CHAT, COMPLETIONS, Asked, Refused, read_body
from hybrid.errors import UsageError


@dataclass(frozen=True)
class Line:
    """Line `number` (from 1) of the input; `digest` tells whether a line of that name still asks the same."""

    number: int
    custom_id: str
    digest: str
    asked: Asked


@dataclass(frozen=True)
class Bad:
    """A line that cannot be answered; `why` is for its entry among the errors."""

    number: int
    custom_id: str
    digest: str
    why: Refused


@dataclass(frozen=True)
class Lines:
    """All of an input: what can be answered, what cannot, and how many lines were empty."""

    good: list[Line] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    empty: int = 0

    @property
    def digests(self) -> dict[str, str]:
        """custom_id -> digest of every line."""
        good = {line.custom_id: line.digest for line in self.good}
        return good | {line.custom_id: line.digest for line in self.bad}


def read_lines(raw: Iterable[bytes], *, text: bool = False, system: str | None = None) -> Lines:
    """Read an input line by line; with `text` each is a question of its own, `system` the prompt before every one.

    Lines without a custom_id are called line-1, line-2, ... after their place. Raises UsageError when two lines have
    one name, because nobody could tell their answers apart.
    """
    found, seen = Lines(), dict[str, int]()
    empty = 0
    for number, line in enumerate(raw, 1):
        if not line.strip():
            empty += 1
            continue
        one = _read(number, line, text, system)
        if one.custom_id in seen:
            message = f"Lines {seen[one.custom_id]} and {number} have the same custom_id {one.custom_id!r}."
            raise UsageError(message, "Give every line its own; nothing was run.")
        seen[one.custom_id] = number
        if isinstance(one, Line):
            found.good.append(one)
        else:
            found.bad.append(one)
    return Lines(found.good, found.bad, empty)


def _read(number: int, line: bytes, text: bool, system: str | None) -> Line | Bad:
    custom_id = f"line-{number}"
    digest = _digest([line.decode("utf-8", "replace").strip(), system])
    try:
        fields = {"prompt": _decoded(line).rstrip("\r\n")} if text else _fields(line)
        custom_id = _name(fields, custom_id)
        url, body = _request(fields, system)
        digest = _digest([url, body])
        return Line(number, custom_id, digest, read_body(url, body))
    except Refused as why:
        return Bad(number, custom_id, digest, why)


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("The line is not UTF-8 text.", "invalid_line") from error


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(_decoded(line))
    except (ValueError, RecursionError) as error:
        raise Refused(f"The line is not JSON: {error}.", "invalid_line") from error
    if not isinstance(fields, dict):
        raise Refused("The line is not a JSON object.", "invalid_line")
    return fields


def _name(fields: Mapping[str, Any], default: str) -> str:
    name = fields.get("custom_id", default)
    if not isinstance(name, str) or not name:
        raise Refused("custom_id is not text.", "invalid_custom_id", "custom_id")
    return name


def _request(fields: Mapping[str, Any], system: str | None) -> tuple[str, Any]:
    """(url, body): as written in OpenAI's format; else the line is the body, and a bare prompt a user's message."""
    body = fields["body"] if "body" in fields else {key: fields[key] for key in fields if key not in _AROUND}
    if not isinstance(body, dict):
        raise Refused("body is not a JSON object.", "invalid_body", "body")
    if fields.get("method", "POST") != "POST":
        raise Refused("method is not POST.", "invalid_method", "method")
    if "url" in fields or "body" in fields:
        return fields.get("url") or (CHAT if "messages" in body else COMPLETIONS), body
    if "messages" in body:
        return CHAT, body
    if not isinstance(body.get("prompt"), str):
        raise Refused("The line has neither messages nor a prompt.", "invalid_line")
    asked = [{"role": "user", "content": body.pop("prompt")}]
    return CHAT, body | {"messages": ([{"role": "system", "content": system}] if system else []) + asked}


_AROUND = ("custom_id", "method", "url")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def described(bad: Iterable[Bad]) -> Iterator[str]:
    """'line 3 (q-3): temperature is "hot" and no number.' for each."""
    for each in bad:
        name = "" if each.custom_id == f"line-{each.number}" else f" ({each.custom_id})"
        yield f"line {each.number}{name}: {each.why}"
