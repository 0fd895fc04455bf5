"""The /commands, run in a conversation with the scripted model and a console that remembers."""

from __future__ import annotations

import base64
import io
import json
import re
import stat
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from cli import slash
from cli.opening import open_conversation
from cli.options import ChatOptions
from cli.output import THEME
from cli.prompt import Prompt
from cli.repl import Repl
from hybrid.chat.session import SessionStore
from hybrid.errors import KimiError, UsageError


class Quiet:
    """A keyboard nobody touches."""

    def listening(self, actions: object) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def take_typed(self) -> str:
        return ""


@pytest.fixture
def repl(scripted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repl:
    from rich.theme import Theme

    monkeypatch.chdir(tmp_path)
    store = SessionStore(tmp_path / "sessions")
    options = ChatOptions(think=False)
    conversation = open_conversation(options, scripted.ScriptedKimi(), store, None)
    console = Console(file=io.StringIO(), width=100, theme=Theme(THEME), highlight=False, markup=False)
    return Repl(conversation, Prompt({}), console, Quiet(), options, slash.parse)  # type: ignore[arg-type]


def said(repl: Repl, *lines: str) -> str:
    """What the chat prints for these lines."""
    repl.console.file = io.StringIO()
    for line in lines:
        repl.take(line)
    return repl.console.file.getvalue()


@pytest.mark.parametrize(
    "line, name, argument",
    [
        ("/help", "/help", ""),
        ("/? keys", "/?", "keys"),
        ("/Think ON", "/think", "ON"),
        ("/read a b.txt ", "/read", "a b.txt"),
    ],
)
def test_commands_are_recognised(line: str, name: str, argument: str) -> None:
    call = slash.parse(line)
    assert call is not None and name in call.command.names and call.argument == argument


@pytest.mark.parametrize(
    "line",
    ["hello", " /help", "/tmp", "/tmp is full", "/usr/local/nothing/here", "// comment", "/* C */", "/", "a /help"],
)
def test_other_lines_are_text(line: str) -> None:
    assert slash.parse(line) is None


def test_an_unknown_command_never_reaches_the_model(repl: Repl) -> None:
    assert "There is no command /rety. Did you mean /retry?" in said(repl, "/rety")
    assert "/help lists the commands" in said(repl, "/zzzz")
    assert repl.conversation.turns == 0
    with pytest.raises(UsageError, match="A space before it"):
        slash.parse("/rety")


@pytest.mark.parametrize("word", ["exit", "QUIT", " bye "])
def test_bare_farewells_are_explained(repl: Repl, word: str) -> None:
    assert "Ctrl-D leaves" in said(repl, word)
    assert repl.conversation.turns == 0 and not repl.done


def test_help_names_every_command_and_key(repl: Repl) -> None:
    text = said(repl, "/help")
    assert all(name in text for command in slash.COMMANDS for name in command.names)
    assert "Ctrl-T" in said(repl, "/? keys")
    assert "/image" not in text


@pytest.mark.parametrize("name", ["/exit", "/quit", "/bye"])
def test_leaving(repl: Repl, name: str) -> None:
    said(repl, name)
    assert repl.done


def test_new_keeps_the_system_prompt_and_the_old_session(repl: Repl) -> None:
    said(repl, "/system Be kind.", "one", "/new", "two")
    assert [m.content for m in repl.conversation.messages] == ["Be kind.", "two", "You said: two"]
    assert len(repl.conversation.store.list()) == 2


def test_retry_sends_again(repl: Repl) -> None:
    assert "no question" in said(repl, "/retry")
    said(repl, "one", "/retry")
    kimi: Any = repl.kimi
    assert len(kimi.asked) == 2 and kimi.asked[0] == kimi.asked[1]
    assert repl.conversation.turns == 1


def test_an_answer_that_fails_on_the_way_is_kept_as_one_that_was_stopped(repl: Repl) -> None:
    text = said(repl, "one break:2")
    assert "error: The server is gone. Start it again." in text and "What was written is kept (/retry" in text
    kept = repl.conversation.store.latest()
    assert kept is not None and kept.messages == repl.conversation.messages
    question, answer = kept.messages[-2:]
    assert (question.content, answer.content, answer.interrupted) == ("one break:2", "You said:", True)


def test_a_retry_that_fails_leaves_the_former_answer(repl: Repl, monkeypatch: pytest.MonkeyPatch) -> None:
    said(repl, "one")
    before = list(repl.conversation.messages)

    def gone(*arguments: Any, **settings: Any) -> Any:
        raise KimiError("The server is gone.", "Start it again.")

    monkeypatch.setattr(repl.kimi, "reply", gone)
    assert "is gone" in said(repl, "/retry") and "is gone" in said(repl, "/retry")
    kept = repl.conversation.store.latest()
    assert kept is not None and kept.messages == repl.conversation.messages == before


def test_undo_and_edit(repl: Repl) -> None:
    said(repl, "one", "two", "three")
    assert "Removed 2 turns." in said(repl, "/undo 2")
    assert repl.conversation.turns == 1
    said(repl, "/edit")
    assert repl.draft == "one" and repl.conversation.turns == 0
    assert repl.conversation.store.list() == []
    assert "nothing to undo" in said(repl, "/undo")
    assert "no question" in said(repl, "/edit")
    assert "error:" in said(repl, "/undo x")


def test_system(repl: Repl) -> None:
    assert "You are Kimi" in said(repl, "/system")
    assert "is read anew" in said(repl, "one", "/system Talk like a pirate.")
    assert repl.conversation.messages[0].content == "Talk like a pirate."
    said(repl, '/system ""')
    assert repl.conversation.system is None and "There is no system prompt" in said(repl, "/system")


def test_think_and_set(repl: Repl) -> None:
    assert "Thinking is off." in said(repl, "/think")
    assert "Thinking is on, at most 2,048 tokens." in said(repl, "/think 2k")
    assert repl.conversation.settings.think_budget == 2048
    assert "Thinking is off." in said(repl, "/think off")
    text = said(repl, "/set temp 0.25", "/set")
    rows = {row[0]: row[1:] for line in text.splitlines() if (row := line.split())}
    assert rows["temperature"] == ["0.25", "/set"] and rows["top_p"] == ["0.95", "model"]
    assert rows["think"] == ["off", "/set"]
    kimi: Any = repl.kimi
    assert repl.conversation.settings.params(kimi).temperature == 0.25
    assert "0.6" in said(repl, "/set temp default")
    assert "Did you mean temperature?" in said(repl, "/set temprature 1")
    assert "It must be above 0 and at most 1." in said(repl, "/set top_p 3")
    assert "neither on nor off" in said(repl, "/think maybe")


def test_settings_come_back_with_the_session(repl: Repl) -> None:
    said(repl, "/set temp 0.25", "/think on", "one", "/save kept")
    store = repl.conversation.store
    options = ChatOptions(temp=0.75, origins={"temp": "flag"})
    fresh = open_conversation(options, repl.kimi, store, store.load("kept"))
    rows = {name: (value, origin) for name, value, origin in fresh.settings.table(repl.kimi)}
    assert rows["temperature"] == ("0.75", "flag") and rows["think"] == ("on", "session")


def test_thoughts(repl: Repl) -> None:
    assert "without thoughts" in said(repl, "/thoughts last")
    assert "thought 1 thought 2" in said(repl, "/think on", "one", "/thoughts last")
    assert "not shown" in said(repl, "/thoughts hide") and repl.thoughts == "hide"
    assert "error:" in said(repl, "/thoughts maybe")


def test_figures(repl: Repl) -> None:
    assert "No answer yet." in said(repl, "/stats")
    said(repl, "one", "two")
    text = said(repl, "/stats")
    assert "2 answers" in text and "RAM 19 GB/s (76% of 25)" in text
    assert re.search(r"█*░+ \d+ of 32,768 tokens \(0%\)", said(repl, "/ctx"))
    assert re.search(r"questions +2 +2 tok", said(repl, "/tokens"))
    assert "3 tokens" in said(repl, "/tokens three short words")
    text = said(repl, "/experts")
    assert "layer 1 █" in text and "0: 90%" in text and "10 of 16 experts used (62%)" in text
    assert "off" in said(repl, "/stats off") and repl.stats is False


def test_save_load_sessions(repl: Repl) -> None:
    assert "nothing to save" in said(repl, "/save x")
    assert "no saved conversations" in said(repl, "/sessions")
    first = repl.conversation.session.id
    assert "Saved as 'blue door'" in said(repl, "remember the door", "/save blue door")
    said(repl, "/new", "another")
    listing = said(repl, "/sessions")
    assert "blue door" in listing and "another (this one)" in listing and first in listing
    assert "You said: remember the door" in said(repl, "/load blue door")
    assert repl.conversation.session.id == first
    assert "another" in said(repl, "/resume")
    assert "error: There is no session 'nothing'" in said(repl, "/load nothing")
    path = repl.conversation.store.directory / f"{first}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_loading_another_models_session_warns(repl: Repl) -> None:
    said(repl, "one")
    session = repl.conversation.session
    session.model = "other"
    repl.conversation.store.save(session)
    assert "held with other; it continues with scripted" in said(repl, f"/load {session.id}")


def test_export(repl: Repl, tmp_path: Path) -> None:
    said(repl, "/think on", "What is **this**?", "/export", "/export talk.json")
    text = (tmp_path / "what-is-this.md").read_text()
    assert text.startswith("# What is **this**?") and "## You\n\nWhat is **this**?" in text
    assert "> thought 1" in text and "## scripted" in text
    value = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in value["messages"]] == ["system", "user", "assistant"]
    assert "error:" in said(repl, "/export talk.txt")
    assert "error: /nowhere" in said(repl, "/export /nowhere/x.md")


def test_copy(repl: Repl) -> None:
    assert "no answer to copy" in said(repl, "/copy")
    said(repl, "say:markdown")
    sent = re.search(r"\x1b\]52;c;(.*?)\x07", said(repl, "/copy 1"))
    assert sent is not None
    assert base64.b64decode(sent[1]).decode() == "def answer(x):\n    return x + 42\n"
    sent = re.search(r"\x1b\]52;c;(.*?)\x07", said(repl, "/copy"))
    assert sent is not None and base64.b64decode(sent[1]).decode().startswith("# Fruit")
    assert "has 1 code block" in said(repl, "/copy 7")


def test_read_puts_a_file_into_the_next_message(repl: Repl, tmp_path: Path) -> None:
    (tmp_path / "my notes.txt").write_text("alpha\nbeta\n")
    assert "tokens. Add a question" in said(repl, "/read my notes.txt")
    assert repl.draft == "[my notes.txt #1, 2 lines] "
    assert repl.prompt.pastes.expand(repl.draft + "what?") == "alpha\nbeta\n what?"
    (tmp_path / "image.bin").write_bytes(b"\x89PNG\0\0")
    assert "no text file" in said(repl, "/read image.bin")
    assert "No such file" in said(repl, "/read missing.txt")
    assert "/read needs a file" in said(repl, "/read")


def test_tool_calls_are_shown(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    said(repl, "say:tool")
    assert repl.conversation.messages[-1].tool_calls[0].name == "look"
