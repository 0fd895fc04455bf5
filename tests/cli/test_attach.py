"""`kimi-local chat` beside `kimi-local serve`: two real processes, and one copy of the model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybrid.chat.session import SessionStore
from tests.cli.test_serve import served

Start = Callable[..., "Terminal"]  # noqa: F821  the class lives in conftest
GREEDY = ("--temp", "0", "-n", "16")
LIMIT = "Stopped at the limit of 16 tokens: --max-tokens sets it.\n"


def chat(home: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", "chat", *GREEDY, *options]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=home, timeout=120)


def records(home: dict[str, str]) -> list[Path]:
    return list(Path(home["XDG_STATE_HOME"], "kimi-local", "servers").glob("*"))


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    del told["timings"]
    del told["usage"]["cached_tokens"]
    return told


def test_one_answer_is_the_same_attached_and_not(home: dict[str, str], talker: Path, tiny: Path) -> None:
    question = ("--json", "-p", "hello there")
    with served(home, str(talker), "--ctx", "4k") as (process, address):
        line = f"attached to the server at {address} (talker)\n{LIMIT}"
        attached = chat(home, *question)
        assert attached.stderr == line
        kept = SessionStore(Path(home["XDG_STATE_HOME"], "kimi-local", "sessions")).latest()
        assert kept is not None and kept.settings["model_path"] == str(talker.resolve())
        linked = talker.parent / "linked"
        linked.symlink_to(talker)
        assert chat(home, str(linked), *question).stderr == line
        assert chat(home, "--attach", address, *question).stderr == line
        assert chat(home, "-q", *question).stderr == ""
        for alone in ((str(talker), "--attach", "never"), (str(talker), "--threads", "1")):
            loaded = chat(home, *alone, *question)
            assert loaded.stderr == LIMIT and answer(loaded) == answer(attached)
        assert answer(chat(home, str(tiny), *question))["model"] == "tiny"
        both = chat(home, "--attach", address, "--ctx", "1k", *question)
        assert both.returncode == 2 and "--ctx says how to load" in both.stderr
        long = chat(home, "-p", "word " * 5000)
        assert long.returncode == 1 and "4,096" in long.stderr
        assert len(records(home)) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert records(home) == []


def test_a_conversation_outlives_its_server(terminal: Start, home: dict[str, str], talker: Path) -> None:
    with served(home, str(talker), "--ctx", "32k") as (process, address):
        t = terminal("--temp", "0", "--think", scripted=False)
        t.wait(f"attached to the server at {address} (talker)", timeout=60)
        t.wait("talker · 12 layers, 8 experts (4 per token) · ctx 32k · thinking")
        t.ask("first question")
        t.wait_thinking()
        t.send("\x03")
        t.wait("Stopped; what was written is kept")
        t.ask("second question")
        t.wait_thinking()
        t.send("\x14")
        t.wait(lambda: t.text().count("Thought for ") == 2)
        t.send("\x03")
        t.wait(lambda: t.text().count("Stopped; what was written is kept") == 2)
        t.ask("/experts")
        t.wait("experts used")
        t.ask("/stats")
        t.wait("read per token, RAM ")
        t.ask("third question")
        t.wait_thinking()
        process.kill()
        t.wait("is gone")
        t.wait("serve) and repeat the question")
        t.wait("What was written is kept (/retry asks again).")
        t.ask("/stats")
        t.wait("this session")
        t.ask("/retry")
        t.wait(lambda: t.text().count("is gone") == 2)
        t.ask("/exit")
        assert t.exit_code() == 0 and "Traceback" not in t.text()
    kept = SessionStore(Path(home["XDG_STATE_HOME"], "kimi-local", "sessions")).latest()
    assert kept is not None
    assert [message.content for message in kept.messages if message.role == "user"] == [
        "first question",
        "second question",
        "third question",
    ]
    assert kept.messages[-1].interrupted and kept.messages[-1].reasoning_content, "what came before the end"
    assert len(records(home)) == 1, "the server had no time to remove it"
    alone = chat(home, str(talker), "-p", "hello")
    assert alone.returncode == 0 and "attached" not in alone.stderr
    assert records(home) == []


def test_one_answer_whose_server_dies_is_kept_as_far_as_it_came(home: dict[str, str], talker: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "chat", "--temp", "0", "-p", "hello there"]
    pipe = subprocess.PIPE
    with (
        served(home, str(talker), "--ctx", "32k") as (process, _),
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=home) as asking,
    ):
        assert asking.stderr is not None and asking.stderr.readline().startswith("attached to")
        begun = asking.stderr.read(20)
        process.kill()
        _, told = asking.communicate(timeout=60)
    assert asking.returncode == 1 and "is gone" in told and "Traceback" not in told
    kept = SessionStore(Path(home["XDG_STATE_HOME"], "kimi-local", "sessions")).latest()
    assert kept is not None and [message.role for message in kept.messages][-2:] == ["user", "assistant"]
    assert kept.messages[-1].interrupted and (kept.messages[-1].reasoning_content or "").startswith(begun)


def test_a_server_that_wants_a_key(home: dict[str, str], tiny: Path) -> None:
    secret = {"KIMI_LOCAL_API_KEY": "secret"}
    with served(home | secret, str(tiny)) as (_, address):
        refused = chat(home, "-p", "hello")
        assert (refused.returncode, refused.stdout) == (1, "")
        remedy = "Give it with --api-key or as KIMI_LOCAL_API_KEY, or load the model here with --attach never."
        assert refused.stderr == f"error: The server at {address} wants an API key. {remedy}\n"
        assert chat(home, "--api-key", "wrong", "-p", "hello").stderr.startswith("error: The server at")
        assert chat(home, "--api-key", "secret", "-p", "hello").returncode == 0
        assert chat(home | secret, "-p", "hello").returncode == 0
