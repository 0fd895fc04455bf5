"""The frame: help, errors as one line, exit codes. Each command runs in a process of its own, as users run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli import main as program
from hybrid.errors import CheckpointError, DoesNotFit, UsageError


def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        input=stdin, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "100", **environment},
    )  # fmt: skip


def test_help_begins_with_examples() -> None:
    done = run("--help")
    text = done.stdout
    assert done.returncode == 0 and "Examples" in text
    assert text.index("kimi-local chat -p") < text.index("--version")
    commands = set(re.findall(r"^│ (\w+) ", text, re.MULTILINE))
    assert {"chat", "doctor", "pull", "bench", "quantize", "calibrate", "compare", "eval"} <= commands


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys\ntry:\n    from cli.main import main; main(['chat', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numba', 'prompt_toolkit', 'numpy', 'transformers', 'tiktoken'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_chat_help_shows_examples_before_options_and_the_environment_rule() -> None:
    text = run("chat", "-h").stdout
    assert text.index("kimi-local chat -c") < text.index("--prompt")
    assert "KIMI_LOCAL_TOP_P" in text and "130 interrupted" in " ".join(text.split())
    for option in ("--system-file", "--think-budget", "--stream-json", "--no-history", "--activations"):
        assert option in text


def test_no_command_shows_help() -> None:
    done = run()
    assert done.returncode == 0 and "Usage" in done.stdout


def test_version() -> None:
    done = run("--version")
    assert re.fullmatch(r"kimi-local \d+\.\d+\.\d+\S*\n", done.stdout)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["chta"], "Did you mean 'chat'"),
        (["chat", "--tempp", "1"], "--temp"),
        (["chat", "--ctx", "32x", "-p", "x"], "'32x' is no number of tokens"),
        (["chat", "--temp", "hot", "-p", "x"], "--temp"),
        (["chat", "--top-p", "1.5", "-p", "x"], "--top-p"),
        (["chat", "--activations", "int3", "-p", "x"], "--activations"),
        (["chat", "a", "b"], "unexpected extra argument"),
        (["chat", "-p"], "requires an argument"),
        (["chat", "a", "-m", "b", "-p", "x"], "Two models"),
        (["chat", "-c", "-S", "x", "-p", "x"], "cannot be used together"),
        (["chat", "--json", "--stream-json", "-p", "x"], "cannot be used together"),
        (["chat", "-s", "x", "--system-file", "y", "-p", "x"], "cannot be used together"),
        (["chat"], "There is no question"),
        (["chat", "-p", "-"], "There is no question"),
        (["chat", "-p", "  "], "There is no question"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and words in done.stderr


def test_a_missing_session_or_system_file_is_one_line(tmp_path: Path) -> None:
    done = run("chat", "-S", "nothing", "-p", "x", XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 1 and "nothing" in done.stderr and done.stderr.count("\n") == 1
    done = run("chat", "-c", "-p", "x", XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 1 and "There is no conversation to continue." in done.stderr


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UsageError("Wrong.", "Do it right."), 2, "error: Wrong. Do it right."),
        (DoesNotFit("Too\nlarge.", "Buy more."), 3, "error: Too large. Buy more."),
        (CheckpointError("Damaged."), 4, "error: Damaged."),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 1, "error: x.txt: No such file or directory."),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_a_line_and_a_code(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr("cli.chat.run_chat", fail)
    with pytest.raises(SystemExit) as ended:
        program.main(["chat", "-p", "x"])
    assert ended.value.code == code
    assert capsys.readouterr().err.strip() == line


@pytest.mark.parametrize("arguments", [["--debug", "chat", "-p", "x"], ["chat", "-p", "x", "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> int:
        raise CheckpointError("Damaged.")

    monkeypatch.setattr("cli.chat.run_chat", fail)
    with pytest.raises(CheckpointError):
        program.main(arguments)
    monkeypatch.setenv("KIMI_LOCAL_DEBUG", "1")
    with pytest.raises(CheckpointError):
        program.main(["chat", "-p", "x"])


def test_options_come_from_flags_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("cli.chat.run_chat", lambda options: seen.append(options) or 0)
    monkeypatch.setenv("KIMI_LOCAL_TEMP", "0.25")
    monkeypatch.setenv("KIMI_LOCAL_MODEL", "/models/env")
    monkeypatch.setenv("KIMI_LOCAL_THINK", "0")
    monkeypatch.setenv("KIMI_LOCAL_CTX", "64k")
    for arguments in (["-p", "x"], ["-p", "x", "--temp", "0.5", "-m", "/models/flag", "--think", "--ctx", "8k"]):
        with pytest.raises(SystemExit) as ended:
            program.main(["chat", *arguments])
        assert ended.value.code == 0
    env, flag = seen
    assert (env.temp, env.model, env.think, env.ctx) == (0.25, "/models/env", False, 65536)
    assert (flag.temp, flag.model, flag.think, flag.ctx) == (0.5, "/models/flag", True, 8192)
    assert env.origins["temp"] == "env" and flag.origins["temp"] == "flag"
