"""Sessions on disk: saved whole or not at all, private, and a damaged one harms no other."""

import json
import os
import stat
from pathlib import Path

import pytest

from hybrid.chat.message import Message, ToolCall
from hybrid.chat.session import Session, SessionStore
from hybrid.errors import KimiError

TURNS = [
    Message("system", "s"),
    Message("user", "What is\nthe weather? 🙂\udc80"),
    Message("assistant", "", "hm", (ToolCall("functions.f:0", "f", '{"a": "é"}'),)),
    Message("tool", "sun", tool_call_id="functions.f:0", name="f"),
    Message("assistant", "Sunny", interrupted=True),
]


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    return SessionStore(tmp_path / "deep" / "sessions")


def saved(store: SessionStore, title: str = "", messages: list[Message] | None = None) -> Session:
    session = store.new("demo")
    session.title = title
    session.messages = messages if messages is not None else list(TURNS)
    session.settings = {"temperature": 0.5}
    store.save(session)
    return session


def path_of(store: SessionStore, session: Session) -> Path:
    return store.directory / f"{session.id}.json"


def test_there_and_back(store: SessionStore) -> None:
    session = saved(store)
    assert store.load(session.id) == session
    assert session.title == "What is"
    assert store.latest() == session
    assert session.created <= session.updated


def test_nothing_is_written_before_the_first_save(store: SessionStore) -> None:
    session = store.new("demo")
    assert not store.directory.exists()
    assert (list(store.list()), list(store.damaged()), store.latest()) == ([], [], None)
    assert store.new("demo").id != session.id


def test_files_are_private_and_readable_as_json(store: SessionStore) -> None:
    session = saved(store)
    assert stat.S_IMODE(path_of(store, session).stat().st_mode) == 0o600
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    values = json.loads(path_of(store, session).read_bytes().decode("utf-8", "surrogatepass"))
    assert values["messages"][-1] == {"role": "assistant", "content": "Sunny", "interrupted": True}
    assert [path.name for path in store.directory.iterdir()] == [f"{session.id}.json"]


def test_the_one_saved_last_comes_first(store: SessionStore) -> None:
    sessions = [saved(store, f"t{n}") for n in range(3)]
    assert [session.title for session in store.list()] == ["t2", "t1", "t0"]
    store.save(sessions[0])
    assert [session.title for session in store.list()] == ["t0", "t2", "t1"]
    latest = store.latest()
    assert latest is not None and latest.id == sessions[0].id


def test_found_by_title_and_by_the_beginning_of_the_id(store: SessionStore) -> None:
    session, other = saved(store, "Weather talk"), saved(store, "x")
    assert store.load("weather TALK").id == session.id
    different = next(n for n, (a, b) in enumerate(zip(session.id, other.id, strict=True)) if a != b)
    assert store.load(session.id[: different + 1]).id == session.id
    with pytest.raises(KimiError, match="2 sessions fit") as error:
        store.load(session.id[:2])
    assert session.id in error.value.message and other.id in error.value.message


@pytest.mark.parametrize("name", ["", "nothing", "../secret", "/etc/passwd", "x" * 5_000, "\0"])
def test_what_is_not_there(store: SessionStore, name: str) -> None:
    saved(store, "t")
    (store.directory.parent / "secret.json").write_text("{}")
    for act in (store.load, store.remove):
        with pytest.raises(KimiError, match="no session"):
            act(name)
    assert (store.directory.parent / "secret.json").exists()


def test_remove(store: SessionStore) -> None:
    session, other = saved(store, "a"), saved(store, "b")
    store.remove(session.id)
    assert [s.id for s in store.list()] == [other.id]
    with pytest.raises(KimiError, match="no session"):
        store.remove(session.id)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"version": 1}',
        b'{"version": 99, "id": "ID", "messages": []}',
        b'{"version": 1, "id": "another", "model": "m", "messages": []}',
        b'{"version": 1, "id": "ID", "model": 5, "messages": []}',
        b'{"version": 1, "id": "ID", "model": "m", "messages": {}}',
        b'{"version": 1, "id": "ID", "model": "m", "messages": [{"content": "x"}]}',
        b'{"version": 1, "id": "ID", "model": "m", "messages": [5]}',
        b'{"version": 1, "id": "ID", "model": "m", "messages": [], "settings": 5}',
    ],
)
def test_a_damaged_file_is_named_and_harms_no_other(store: SessionStore, content: bytes) -> None:
    good, bad = saved(store, "good"), saved(store, "bad")
    path_of(store, bad).write_bytes(content.replace(b"ID", bad.id.encode()))
    with pytest.raises(KimiError, match=str(path_of(store, bad))) as error:
        store.load(bad.id)
    assert error.value.remedy and "\n" not in str(error.value)
    assert [session.id for session in store.list()] == [good.id]
    assert store.latest() == good
    assert list(store.damaged()) == [path_of(store, bad)]
    store.remove(bad.id)
    assert list(store.damaged()) == []


def test_every_truncation_is_noticed(store: SessionStore) -> None:
    session = saved(store)
    data = path_of(store, session).read_bytes()
    for end in range(0, len(data.rstrip()), 7):
        path_of(store, session).write_bytes(data[:end])
        assert list(store.list()) == []


def test_a_failed_save_leaves_the_old_file(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    session = saved(store)
    before = path_of(store, session).read_bytes()
    session.messages.append(Message("user", "more"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(KimiError, match="No space left") as error:
            store.save(session)
    assert error.value.remedy
    assert path_of(store, session).read_bytes() == before
    assert [path.name for path in store.directory.iterdir()] == [f"{session.id}.json"]


def test_no_place_for_sessions(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = SessionStore(tmp_path / "file" / "sessions")
    with pytest.raises(KimiError, match="cannot be saved"):
        store.save(store.new("demo"))


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("  Hello  \nworld", "Hello"),
        ("x" * 60, "x" * 60),
        ("word " * 30, "word word word word word word word word word word word word…"),
        ("   ", ""),
    ],
)
def test_titles(store: SessionStore, question: str, title: str) -> None:
    assert saved(store, messages=[Message("system", "s"), Message("user", question)]).title == title


def test_a_given_title_stays(store: SessionStore) -> None:
    assert store.load(saved(store, "mine").id).title == "mine"


def test_other_files_are_left_alone(store: SessionStore) -> None:
    saved(store)
    for name in ("notes.txt", ".hidden.json.tmp", "has space.json"):
        (store.directory / name).write_text("x")
    assert len(store.list()) == 1
    assert list(store.damaged()) == []
