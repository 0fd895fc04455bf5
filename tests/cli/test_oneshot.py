"""Pipes in and out: stdout is the answer, the whole answer, and nothing but the answer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybrid.chat.session import SessionStore

SCRIPTED = Path(__file__).with_name("scripted.py")


def start(home: dict[str, str], *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPTED), *arguments], stdin=stdin, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=home,
    )  # fmt: skip


def ask(home: dict[str, str], *arguments: str, stdin: str = "") -> tuple[int, str, str]:
    process = start(home, *arguments, stdin=subprocess.PIPE)
    out, err = process.communicate(stdin, timeout=60)
    return process.returncode, out, err


def test_stdout_is_the_answer_and_stderr_the_reasoning(home: dict[str, str]) -> None:
    code, out, err = ask(home, "-p", "hello **you**")
    assert (code, out) == (0, "You said: hello **you**\n")
    assert err == "thought 1 thought 2 thought 3 thought 4 \n\n"
    assert ask(home, "-p", "hello", "-q") == (0, "You said: hello\n", "")
    assert ask(home, "-p", "hello", "--hide-thinking")[2] == ""
    assert ask(home, "-p", "hello", "--no-think")[2] == ""


def test_standard_input_comes_before_the_argument(home: dict[str, str]) -> None:
    assert ask(home, "-q", "-p", "explain", stdin="line 1\nline 2\n")[1] == "You said: line 1\nline 2\n\nexplain\n"
    assert ask(home, "-q", stdin="only this\n")[1] == "You said: only this\n"
    assert ask(home, "-q", "-p", "-", stdin="from stdin")[1] == "You said: from stdin\n"
    assert ask(home, "-q", "-p", "é", stdin="")[1] == "You said: é\n"


def test_markdown_is_left_alone_in_a_pipe_and_drawn_when_colour_is_forced(home: dict[str, str]) -> None:
    _, out, _ = ask(home, "-q", "-p", "say:markdown")
    assert out.startswith("# Fruit\n\nSome **bold words**") and out.endswith("The end.\n")
    _, forced, _ = ask(home | {"FORCE_COLOR": "1", "COLUMNS": "60"}, "-q", "-p", "say:markdown")
    assert "\x1b[1mbold words" in forced and "**" not in forced and "The end." in forced
    _, raw, _ = ask(home | {"FORCE_COLOR": "1"}, "-q", "--raw", "-p", "say:markdown")
    assert raw == out
    assert ask(home, "-q", "--no-stream", "-p", "say:markdown")[1] == out


def test_json_is_one_object(home: dict[str, str]) -> None:
    code, out, err = ask(home, "--json", "-p", "think:3 hi")
    answer = json.loads(out)
    assert code == 0 and err == "" and out.count("\n") == 1
    assert answer["text"] == "You said: think:3 hi" and answer["reasoning"] == "thought 1 thought 2 thought 3 "
    usage = answer["usage"]
    assert usage.pop("prompt_tokens") > 5
    assert usage == {"cached_tokens": 0, "completion_tokens": 7, "thinking_tokens": 3}
    assert answer["finish_reason"] == "stop" and answer["model"] == "scripted" and answer["tool_calls"] == []
    assert answer["timings"]["first_token_s"] > 0 and answer["timings"]["total_s"] > 0


def test_json_lines_add_up_to_the_object(home: dict[str, str]) -> None:
    _, out, _ = ask(home, "--stream-json", "-p", "think:3 hi")
    *deltas, result = map(json.loads, out.splitlines())
    assert result.pop("type") == "result"
    assert "".join(d["text"] for d in deltas if d["type"] == "text") == result["text"]
    assert "".join(d["text"] for d in deltas if d["type"] == "reasoning") == result["reasoning"]


def test_tool_calls_are_told(home: dict[str, str]) -> None:
    _, out, _ = ask(home, "--json", "--no-think", "-p", "say:tool")
    call = {"id": "functions.look:0", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    answer = json.loads(out)
    assert answer["tool_calls"] == [call] and answer["finish_reason"] == "tool_calls"


def test_a_limit_is_told_on_stderr(home: dict[str, str]) -> None:
    code, out, err = ask(home, "--no-think", "-n", "2", "-p", "one two three")
    assert (code, out) == (0, "You said:\n")
    assert err == "Stopped at the limit of 2 tokens: --max-tokens sets it.\n"


def test_stats_are_off_in_a_pipe_unless_asked_for(home: dict[str, str]) -> None:
    assert "tok/s" not in ask(home, "-p", "x")[2]
    err = ask(home, "-p", "x", "--no-think", "--stats")[2]
    assert "tok/s" in err and "RAM 19 GB/s (76% of 25)" in err


def test_ctrl_c_gives_what_there_is_and_130(home: dict[str, str]) -> None:
    process = start(home, "--no-think", "-p", "say:long delay:0.05")
    assert process.stdout is not None
    begun = process.stdout.readline() + process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "Interrupted.\n"
    assert begun == "1. item number 1 of a long list\n2. item number 2 of a long list\n"
    assert "60." not in out and out.endswith("\n")


def test_ctrl_c_with_json_is_still_an_object(home: dict[str, str]) -> None:
    process = start(home, "--json", "--no-think", "-p", "say:long delay:0.05")
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(out)["finish_reason"] == "interrupted"


def test_a_closed_pipe_ends_it_quietly(home: dict[str, str]) -> None:
    with start(home, "--no-think", "-p", "say:long delay:0.01") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) == 141
        assert process.stderr.read() == ""


def test_a_conversation_goes_on_from_pipe_to_pipe(home: dict[str, str]) -> None:
    ask(home, "-q", "--no-think", "-s", "Be brief.", "-p", "first")
    ask(home, "-q", "--no-think", "-c", "-p", "second")
    ask(home, "-q", "--no-think", "--no-history", "-p", "not kept")
    store = SessionStore(Path(home["XDG_STATE_HOME"], "kimi-local", "sessions"))
    assert len(store.list()) == 1
    messages = [(message.role, message.content) for message in store.list()[0].messages]
    assert messages == [
        ("system", "Be brief."), ("user", "first"), ("assistant", "You said: first"),
        ("user", "second"), ("assistant", "You said: second"),
    ]  # fmt: skip


@pytest.mark.parametrize("arguments, system", [((), "You are Kimi"), (("-s", ""), None), (("-s", "Short."), "Short.")])
def test_the_system_prompt(home: dict[str, str], arguments: tuple[str, ...], system: str | None) -> None:
    ask(home, "-q", "-p", "x", *arguments)
    session = SessionStore(Path(home["XDG_STATE_HOME"], "kimi-local", "sessions")).latest()
    assert session is not None
    first = session.messages[0]
    assert first.content.startswith(system) if system else first.role == "user"


def test_an_engine_error_is_one_line(home: dict[str, str]) -> None:
    code, out, err = ask(home, "--no-think", "-p", "fail:nan")
    assert (code, out) == (1, "")
    assert err == "error: The model produced values that are not numbers. Run doctor.\n"
    code, _, err = ask(home, "--no-think", "--ctx", "16", "-p", "word " * 40)
    assert code == 1 and err.startswith("error: The prompt needs ")
    assert (
        not Path(home["XDG_STATE_HOME"], "kimi-local", "sessions").exists()
        or not SessionStore(Path(home["XDG_STATE_HOME"], "kimi-local", "sessions")).list()
    )
