"""`kimi-local chat` as a user runs it: the real engine on a tiny checkpoint, behind a real pseudo-terminal.

Each start takes seconds (torch), so every test is a visit in which several things happen.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hybrid.chat.session import SessionStore

Start = Callable[..., "Terminal"]  # noqa: F821  the class lives in conftest


def sessions(home: dict[str, str]) -> SessionStore:
    return SessionStore(Path(home["XDG_STATE_HOME"], "kimi-local", "sessions"))


def test_stopping_in_every_phase(terminal: Start, talker: Path, home: dict[str, str], tmp_path: Path) -> None:
    t = terminal(str(talker), "--temp", "0", "--ctx", "32k", "--think", scripted=False)
    t.wait("talker · 12 layers, 8 experts (4 per token) · ctx 32k · thinking", timeout=120)

    (tmp_path / "long.txt").write_text("all the words of a long book " * 900)
    t.ask(f"/read {tmp_path}/long.txt")
    t.wait("long.txt #1, 1 line]")
    t.send("\r")
    t.wait(lambda: re.search(r"Reading the prompt ━+─* [\d,]+/[\d,]+ tok", t.text()) is not None)
    t.send("\x03")
    t.wait("Stopped before the answer began")

    t.ask("first question")
    t.wait_thinking()
    t.send("\x03")
    t.wait("Stopped; what was written is kept")
    assert re.search(r"Thought for .*, \d+ tok \(/thoughts last\)", t.text())

    t.ask("second question")
    t.wait_thinking()
    t.send("\x14")
    t.wait(lambda: t.text().count("Thought for ") == 2)
    t.send("typed ahead")
    t.send("\x03")
    t.wait(lambda: t.text().count("Stopped; what was written is kept") == 2)
    t.wait("> typed ahead")
    t.send("\x03")
    assert re.search(r"prompt \d+ tok \(\d+ cached\)", " ".join(t.text().split())), "the second turn reuses the first"

    kept = sessions(home).latest()
    assert kept is not None
    _, one, answer_one, two, answer_two = kept.messages
    assert (one.content, two.content) == ("first question", "second question")
    assert answer_one.interrupted and answer_one.reasoning_content and not answer_one.content
    assert answer_two.interrupted and answer_two.reasoning_content and answer_two.content

    t.ask("/experts")
    t.wait("experts used")
    t.ask("/exit")
    assert t.exit_code() == 0
    assert t.modes() == (True, True)


def test_paste_history_continue_and_kill(terminal: Start, talker: Path, home: dict[str, str]) -> None:
    options = (str(talker), "--temp", "0", "--no-think", "-n", "12")
    t = terminal(*options, scripted=False)
    t.wait_prompt(timeout=120)
    pasted = "\r".join(f"row {n}" for n in range(30))
    t.send(f"\x1b[200~{pasted}\x1b[201~\r")
    t.wait("Stopped at the limit of 12 tokens")
    t.ask("/exit")
    assert t.exit_code() == 0
    first = sessions(home).latest()
    assert first is not None and first.messages[1].content == pasted.replace("\r", "\n")

    t = terminal("--temp", "0", "--no-think", "-c", scripted=False, columns=20, rows=12)  # the session knows its model
    t.wait("(1 turn", timeout=120)
    t.wait_prompt()
    t.send("\x1b[A")
    t.wait("row 29")
    t.send("\x03")
    t.ask("more")
    t.wait(lambda: sum(len(line) for line in t.lines()) > 500)
    assert max(map(len, t.lines())) <= 20
    t.child.kill(signal.SIGKILL)
    assert t.exit_code() == -signal.SIGKILL
    store = sessions(home)
    again = store.latest()
    assert again is not None and again.id == first.id and store.damaged() == []
    assert [message.role for message in again.messages][-2:] == ["assistant", "user"]


def test_terminated_while_answering(terminal: Start, talker: Path, home: dict[str, str]) -> None:
    t = terminal(str(talker), "--temp", "0", "--think", scripted=False)
    t.wait_prompt(timeout=120)
    t.send("question\r")
    t.wait_thinking()
    t.child.kill(signal.SIGTERM)
    assert t.exit_code() == 128 + signal.SIGTERM
    assert t.modes() == (True, True)


def test_interrupting_the_start(terminal: Start, talker: Path) -> None:
    t = terminal(str(talker), scripted=False)
    t.wait(lambda: not t.modes()[0])  # the program has the terminal, the engine is being imported
    t.feed(1.0)
    t.send("\x03")
    assert t.exit_code() == 130
    assert t.modes() == (True, True)
    assert "Traceback" not in t.text()


def command(talker: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "cli.main", "chat", str(talker), "--temp", "0", "--no-think", *options]


def test_pipes(talker: Path, home: dict[str, str]) -> None:
    run = subprocess.run(
        command(talker, "-n", "16", "--json", "-p", "and this"), input="from the pipe", env=home, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["usage"]["completion_tokens"] == 16 and answer["finish_reason"] == "length"
    assert answer["model"] == "talker" and answer["text"]
    session = sessions(home).latest()
    assert session is not None and session.messages[1].content == "from the pipe\n\nand this"


def test_closed_pipe_and_ctrl_c(talker: Path, home: dict[str, str]) -> None:
    with subprocess.Popen(
        command(talker, "-p", "x"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=home
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.wait(timeout=30) == 141
        assert process.stderr.read() == b""
    with subprocess.Popen(
        command(talker, "-p", "x"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=home
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130 and err == b"Interrupted.\n" and out.endswith(b"\n")


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, home: dict[str, str]) -> None:
    run = subprocess.run(
        command(tmp_path / "absent", "-p", "x"), stdin=subprocess.DEVNULL, env=home, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert run.returncode == 4 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
