"""The conversation on a terminal, with replies that wait where a test wants to act."""

from __future__ import annotations

import re
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid.chat.session import SessionStore

Start = Callable[..., "Terminal"]  # noqa: F821  the class lives in conftest


def test_an_answer_is_drawn_and_the_prompt_returns(terminal: Start) -> None:
    t = terminal()
    t.ask("say:markdown think:3")
    t.wait("The end.")
    t.wait_prompt()
    text = t.text()
    assert "**" not in text and "```" not in text
    assert re.search(r"Thought for [\d.]+ m?s, 3 tok \(/thoughts last\)", text)
    assert " 1. apples from the north" in text and "── python · /copy 1" in text
    assert re.search(r"prompt \d+ tok .* · 3\+\d+ tok .* · ctx \d+/32k", text)
    assert "RAM 19 GB/s (76% of 25)" in text
    t.send("\x04")
    assert t.exit_code() == 0


def test_prefill_shows_a_bar_with_the_time_left(terminal: Start) -> None:
    t = terminal()
    t.ask("prefill:2.5")
    t.wait(lambda: re.search(r"Reading the prompt ━+─+ [\d,]+/4,000 tok · \d.\d s left", t.text()) is not None)
    t.wait("You said")
    t.wait_prompt()
    assert "Reading the prompt" not in t.text()


def test_ctrl_c_in_prefill_takes_the_question_back(terminal: Start) -> None:
    t = terminal()
    t.ask("prefill:120 first")
    t.wait("Reading the prompt")
    t.send("\x03")
    t.wait("Stopped before the answer began")
    t.ask("/ctx")
    t.wait(lambda: " 16 of 32,768" in t.text() or " of 32,768" in t.text())
    t.ask("/retry")
    t.wait(lambda: t.text().count("Reading the prompt") >= 1)
    t.send("\x03")
    t.wait_prompt()


def test_ctrl_c_while_thinking_keeps_the_thoughts(terminal: Start) -> None:
    t = terminal()
    t.ask("think:5000 delay:0.02")
    t.wait_thinking()
    assert "Ctrl-T: answer now" in t.text()
    t.send("\x03")
    t.wait("Stopped; what was written is kept")
    t.wait_prompt()
    assert "Thinking…" not in t.text()
    t.ask("/thoughts last")
    t.wait("thought 1 thought 2 thought 3")


def test_ctrl_c_in_the_answer_keeps_the_part(terminal: Start, home: dict[str, str]) -> None:
    t = terminal("--no-think")
    t.ask("say:long delay:0.05")
    t.wait(" 2. item number 2")
    t.send("\x03")
    t.wait("Stopped; what was written is kept")
    t.ask("second question")
    t.wait("You said: second question")
    t.wait_prompt()
    session = SessionStore(Path(home["XDG_STATE_HOME"], "kimi-local", "sessions")).latest()
    assert session is not None
    kinds = [(message.role, message.interrupted) for message in session.messages]
    assert kinds == [("system", False), ("user", False), ("assistant", True), ("user", False), ("assistant", False)]
    assert "item number 2" in session.messages[2].content and "number 60" not in session.messages[2].content


def test_ctrl_t_ends_the_thinking(terminal: Start) -> None:
    t = terminal()
    t.ask("think:5000 delay:0.02 now")
    t.wait_thinking()
    t.send("\x14")
    t.wait("You said:", timeout=60)
    assert re.search(r"Thought for .*, \d\d? tok", t.text())


def test_what_is_typed_during_an_answer_waits_for_the_prompt(terminal: Start) -> None:
    t = terminal("--no-think")
    t.ask("prefill:2 one")
    time.sleep(0.5)
    t.send("typed ahead\r\x1b[200~pasted\nlines\x1b[201~ and half")
    t.wait("You said: prefill:2 one")
    t.wait("You said: typed ahead")
    t.wait(lambda: t.text().endswith("> pasted\n  lines and half"))
    t.send("\r")
    t.wait("You said: pasted\nlines and half")


def test_a_paste_is_one_message_and_a_long_one_is_folded(terminal: Start, home: dict[str, str]) -> None:
    t = terminal("--no-think")
    t.wait_prompt()
    t.send("\x1b[200~first line\r\nsecond line\x1b[201~")
    t.wait("  second line")
    t.send("\r")
    t.wait("You said: first line\nsecond line")
    t.wait_prompt()
    pasted = "\r".join(f"row {n}" for n in range(84))
    t.send(f"about \x1b[200~{pasted}\x1b[201~ please")
    t.wait("> about [Pasted text #1, 84 lines] please")
    t.send("\r")
    t.wait("row 83 please")
    t.wait_prompt()
    session = SessionStore(Path(home["XDG_STATE_HOME"], "kimi-local", "sessions")).latest()
    assert session is not None
    assert session.messages[-2].content == "about " + pasted.replace("\r", "\n") + " please"


def test_several_lines(terminal: Start) -> None:
    t = terminal("--no-think")
    t.wait_prompt()
    t.send("one\x1b\rtwo\nthree\r")
    t.wait("You said: one\ntwo\nthree")
    t.wait_prompt()
    t.send('"""\rblock one\rblock two\r"""\r')
    t.wait("You said: block one\nblock two")
    t.ask("/multi")
    t.wait("Alt-Enter sends it")
    t.wait_prompt()
    t.send("a\rb\x1b\r")
    t.wait("You said: a\nb")


def test_ctrl_c_at_the_prompt(terminal: Start) -> None:
    t = terminal()
    t.wait_prompt()
    t.send("half a question")
    t.wait("half a question")
    t.send("\x03")
    t.wait_prompt()
    t.send("\x03")
    t.wait("Ctrl-D or /exit leaves")
    time.sleep(2.2)
    t.send("\x03")
    t.wait(lambda: t.text().count("Ctrl-D or /exit leaves") == 2)
    t.wait_prompt()
    t.send("\x03")
    assert t.exit_code() == 130
    assert t.modes() == (True, True)


def test_history_and_session_outlive_the_program(terminal: Start, home: dict[str, str]) -> None:
    first = terminal("--no-think")
    first.ask("remember the blue door")
    first.wait("You said: remember the blue door")
    first.ask("/exit")
    assert first.exit_code() == 0
    assert first.modes() == (True, True)
    history = Path(home["XDG_STATE_HOME"], "kimi-local", "history")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600

    second = terminal("--no-think", "-c")
    second.wait("remember the blue door (1 turn")
    second.wait("You said: remember the blue door")
    second.wait_prompt()
    second.send("\x1b[A\x1b[A")
    second.wait(lambda: second.text().endswith("> remember the blue door"))
    second.send("\x03")
    second.wait_prompt()
    second.send("\x12blue\r")
    second.wait(lambda: second.text().endswith("> remember the blue door"))


def test_no_history_leaves_no_trace(terminal: Start, home: dict[str, str]) -> None:
    t = terminal("--no-history")
    t.ask("a secret")
    t.wait("You said: a secret")
    t.ask("/exit")
    assert t.exit_code() == 0
    assert not Path(home["XDG_STATE_HOME"]).exists()


@pytest.mark.parametrize("number, question", [(signal.SIGTERM, ""), (signal.SIGHUP, "think:5000 delay:0.02")])
def test_a_killed_chat_restores_the_terminal_and_keeps_the_question(
    terminal: Start, home: dict[str, str], number: signal.Signals, question: str
) -> None:
    t = terminal()
    t.wait_prompt()
    assert t.modes()[0] is False
    if question:
        t.send(question + "\r")
        t.wait_thinking()
    t.child.kill(number)
    assert t.exit_code() == 128 + number
    assert t.modes() == (True, True)
    assert t.raw.rstrip().endswith(b"\x1b[?2004l")
    if question:
        again = terminal("-c")
        again.wait(f"> {question}")
        assert "The last question was not answered" in again.text()


def test_kill_9_leaves_a_readable_session(terminal: Start, home: dict[str, str]) -> None:
    t = terminal("--no-think")
    t.ask("first")
    t.wait("You said: first")
    t.ask("say:long delay:0.05")
    t.wait("item number 2")
    t.child.kill(signal.SIGKILL)
    store = SessionStore(Path(home["XDG_STATE_HOME"], "kimi-local", "sessions"))
    session = store.latest()
    assert session is not None and store.damaged() == []
    assert [message.role for message in session.messages] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("columns", [20, 33])
def test_narrow_terminals_lose_nothing(terminal: Start, columns: int) -> None:
    t = terminal("--no-think", columns=columns, rows=10)
    t.ask("say:markdown delay:0.005")
    t.wait("The end.", timeout=60)
    t.wait_prompt()
    flat = re.sub(r"\s+", "", t.text())
    for words in ("Fruit", "boldwordsandcode", "applesfromthenorth", "narrowterminalthereis", "returnx+42", "kiwi"):
        assert words in flat, t.text()
    assert "漢字と日本語のとても長い文章がここに入ります" in flat
    assert flat.count("Theend.") == flat.count("Fruit") == 1


@pytest.mark.parametrize("name, last", [("long", "60. item number 60 of a long list"), ("code", "line 40")])
def test_answers_longer_than_the_screen_stay_in_the_scrollback(terminal: Start, name: str, last: str) -> None:
    t = terminal("--no-think", rows=12)
    t.ask(f"say:{name} delay:0.002")
    t.wait(last)
    t.wait_prompt()
    numbers = [int(n) for n in re.findall(r"(?:item number|^line) (\d+)", t.text(), re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 40


def test_resizing_while_an_answer_is_drawn(terminal: Start) -> None:
    t = terminal("--no-think")
    t.ask("say:long delay:0.004")
    t.wait("item number 5 ")
    t.child.setwinsize(24, 60)
    t.screen.resize(24, 60)
    t.wait("60. item number 60 of a long list")
    t.wait_prompt()


def test_model_text_cannot_control_the_terminal(terminal: Start) -> None:
    t = terminal("--no-think")
    t.ask("say:controls")
    t.wait("safe[31m red]0;title 5A end")


def test_no_color(terminal: Start) -> None:
    t = terminal("--no-think", NO_COLOR="1")
    t.ask("say:markdown")
    t.wait("The end.")
    t.wait_prompt()
    colours = re.findall(rb"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d)(?:;\d+)*m", t.raw)
    assert colours == []


def test_dumb_terminals_get_plain_text(terminal: Start) -> None:
    t = terminal("--no-think", TERM="dumb")
    t.wait("/help lists")
    t.send("hello\r")
    t.wait("You said: hello")
    assert re.findall(rb"\x1b\[[\d;]*[A-Za-z]", t.raw) == []  # neither colours nor movements


def test_context_exceeded_tells_the_numbers_and_goes_on(terminal: Start) -> None:
    t = terminal("--no-think", "--ctx", "64")
    t.ask("word " * 80)
    t.wait("the context holds 64")
    text = " ".join(t.text().split())
    assert "/new" in text and "kimi-local chat -c --ctx 128" in text
    t.ask("short")
    t.wait("You said: short")


def test_an_engine_error_does_not_end_the_chat(terminal: Start) -> None:
    t = terminal("--no-think")
    t.ask("fail:nan")
    t.wait("error: The model produced values that are not numbers. Run doctor.")
    t.ask("fine")
    t.wait("You said: fine")


def test_a_stopped_and_continued_chat_takes_the_terminal_back(terminal: Start) -> None:
    t = terminal()
    t.ask("think:400 delay:0.02")
    t.wait_thinking()
    t.child.kill(signal.SIGSTOP)
    t.cook()  # as a shell does
    t.child.kill(signal.SIGCONT)
    t.wait(lambda: t.modes() == (False, False))
    t.send("\x14")
    t.wait("You said")


def test_thoughts_shown_in_full_or_not_at_all(terminal: Start) -> None:
    t = terminal("--stats", rows=12)
    t.ask("/thoughts show")
    t.ask("think:60 one")
    t.wait("You said: think:60 one")
    t.wait_prompt()
    numbers = [int(n) for n in re.findall(r"thought (\d+)", t.text())]
    assert numbers == list(range(1, 61))
    t.ask("/thoughts hide")
    t.ask("think:30 delay:0.03 two")
    t.wait_thinking()
    t.wait("You said: think:30 delay:0.03 two")
    assert len(re.findall(r"thought \d+", t.text())) == 60


def test_raw_and_no_stream(terminal: Start) -> None:
    t = terminal("--no-think", "--raw")
    t.ask("say:markdown")
    t.wait("The end.")
    t.wait_prompt()
    assert "Some **bold words** and `code`, then a list:" in t.text() and "```python" in t.text()
    t = terminal("--no-think", "--no-stream", "--no-stats")
    t.ask("say:markdown delay:0.02")
    t.wait("Answering… (")
    assert "Fruit" not in t.text()
    t.wait("The end.")
    t.wait_prompt()
    assert "Fruit" in t.text() and "tok/s" not in t.text()


def test_one_question_on_a_terminal(terminal: Start) -> None:
    t = terminal("-p", "say:markdown think:20 delay:0.02")
    t.wait_thinking()
    assert "Ctrl-T" not in t.text() and t.modes() == (True, True)
    assert t.exit_code() == 0
    text = t.text()
    assert "The end." in text and "**" not in text and "tok/s" in text and "/copy" not in text
    t = terminal("-p", "say:long delay:0.05", "--no-think")
    t.wait("item number 2")
    t.send("\x03")
    assert t.exit_code() == 130
    assert "Interrupted." in t.text()
