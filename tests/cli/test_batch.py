"""`kimi-local batch` as a process: killed, interrupted, resumed, foretold, refused."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cli.main import main
from hybrid.checkpoint.tiny import make_tiny
from tests.cli.conftest import Terminal

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module("kill_batch")


def write(path: Path, *objects: Any) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in objects))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path: Path) -> list[str]:
    return [each["custom_id"] for each in read(path)]


def batch(*arguments: str | Path) -> int:
    """The command in this process."""
    with pytest.raises(SystemExit) as end:
        main(["batch", *map(str, arguments), "--threads", "1", "--dtype", "float32", "--activations", "float32"])
    assert isinstance(end.value.code, int)
    return end.value.code


QUESTIONS = [{"prompt": f"of the {n}", "max_tokens": 1 + n % 5} for n in range(8)]


def test_answers_then_nothing_to_do_then_more(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.jsonl", *QUESTIONS[:6]), tmp_path / "out.jsonl"
    assert batch(source, "-o", out, "-m", tiny) == 0
    assert sorted(ids(out)) == [f"line-{n}" for n in range(1, 7)]
    err = capsys.readouterr().err
    assert "6 lines to answer, 6 at once." in err and "6 lines answered, " in err and "tok/s" in err
    before = out.read_bytes()
    assert batch(source, "-o", out, "-m", tiny, "--json") == 0
    told, err = capsys.readouterr()
    assert out.read_bytes() == before and "6 lines answered before." in err
    figures = json.loads(told)
    assert (figures["answered"], figures["answered_now"], figures["tokens_per_s"]) == (6, 0, None)
    write(source, *QUESTIONS)
    assert batch(source, "-o", out, "-m", tiny, "-q") == 0
    assert out.read_bytes().startswith(before) and len(set(ids(out))) == len(ids(out)) == 8
    assert capsys.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.manifest.json"]


def test_bad_lines_go_to_the_errors_and_the_rest_runs(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"custom_id": "long", "prompt": "x " * 600}
    source = write(tmp_path / "in.jsonl", {"prompt": "x", "n": 2}, *QUESTIONS[:2], long, {"x": 1})
    out, errors = tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl"
    assert batch(source, "-o", out, "-m", tiny, "--ctx", "256") == 1
    err = capsys.readouterr().err
    assert "line 1: n: One answer per request is made here." in err and "line 5: The line has neither" in err
    assert "3 lines could not be answered: see " in err
    assert sorted(ids(out)) == ["line-2", "line-3"] and sorted(ids(errors)) == ["line-1", "line-5", "long"]
    codes = {each["custom_id"]: each["error"]["code"] for each in read(errors)}
    assert codes["long"] == "context_length_exceeded"
    assert all(each["response"]["status_code"] == 400 for each in read(errors))
    before = errors.read_bytes()
    assert batch(source, "-o", out, "-m", tiny, "--ctx", "256") == 1
    assert errors.read_bytes() == before


def test_text_ordered_and_a_system_prompt(tmp_path: Path, tiny: Path) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("".join(f"of the {9 - n} of\n" for n in range(9)))
    common = ("-m", tiny, "--text", "-s", "Be brief.", "-n", "3", "--no-think")
    assert batch(source, "-o", out, "--ordered", *common) == 0
    assert ids(out) == [f"line-{n}" for n in range(1, 10)]
    body = read(out)[0]["response"]["body"]
    assert body["object"] == "chat.completion" and body["usage"]["completion_tokens"] <= 3
    assert "reasoning_content" not in body["choices"][0]["message"]
    loose = tmp_path / "loose.jsonl"
    assert batch(source, "-o", loose, *common) == 0
    texts = [
        {each["custom_id"]: each["response"]["body"]["choices"] for each in read(path)} for path in (out, loose)
    ]  # fmt: skip
    assert texts[0] == texts[1]


@pytest.mark.parametrize("changed, what", [
    (("--seed", "5"), "seed was 0 and is 5"),
    (("--temp", "0"), "temperature was None and is 0.0"),
    (("--ordered",), "ordered was False and is True"),
    (("-m", "other"), "model was"),
])  # fmt: skip
def test_something_else_is_not_resumed(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], changed: tuple[str, ...], what: str
) -> None:
    source, out = write(tmp_path / "in.jsonl", QUESTIONS[0]), tmp_path / "out.jsonl"
    assert batch(source, "-o", out, "-m", tiny) == 0
    before = out.read_bytes()
    if "other" in changed:
        changed = ("-m", str(make_tiny(tmp_path / "other", seed=1)))
    capsys.readouterr()
    assert batch(source, "-o", out, "-m", tiny, *changed) == 2
    err = capsys.readouterr().err
    assert what in err and "--force" in err and err.count("\n") == 1
    assert batch(source, "-o", out, "-m", tiny, *changed, "--force") == 0
    assert out.read_bytes() == before


def test_what_makes_no_sense_is_refused(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, empty = write(tmp_path / "in.jsonl", QUESTIONS[0]), write(tmp_path / "empty.jsonl")
    twice = write(tmp_path / "twice.jsonl", {"custom_id": "a", "prompt": "x"}, {"custom_id": "a", "prompt": "y"})
    out = tmp_path / "out.jsonl"
    for arguments, code, message in (
        ((source, "-o", source), 2, "same file"),
        ((empty, "-o", out), 2, "has no lines"),
        ((twice, "-o", out), 2, "Lines 1 and 2 have the same custom_id 'a'"),
        ((tmp_path / "none.jsonl", "-o", out), 1, "No such file"),
        ((source, "-o", tmp_path / "none" / "out.jsonl"), 2, "There is no directory"),
        ((source, "-o", out, "--ctx", "1M"), 2, "too long"),
    ):
        assert batch(*arguments, "-m", tiny) == code, message
        assert message in capsys.readouterr().err
    assert not out.exists()


def test_dry_run(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem = "of the " * 100
    alike = [{"prompt": f"{stem} {n}", "max_tokens": 10} for n in range(4)]
    source, out = write(tmp_path / "in.jsonl", *alike, {"x": 1}), tmp_path / "out.jsonl"
    assert batch(source, "-o", out, "-m", tiny, "--dry-run", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["lines"], told["bad"]) == (5, 1)
    figures = told["estimate"]
    assert figures["new_tokens"] == 40 and figures["batch"] == 4 and figures["hours_at_most"] > 0
    assert 3 * 100 <= figures["shared_tokens"] < figures["prompt_tokens"]
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    assert batch(source, "-o", out, "-m", tiny, "--dry-run") == 1
    rows = capsys.readouterr().out
    assert f"{figures['prompt_tokens']:,} tokens" in rows and "predicted" in rows and "5, of which 1" in rows
    assert batch(write(tmp_path / "bad.jsonl", {"x": 1}), "-o", out, "-m", tiny, "--dry-run") == 1
    assert "not known" in capsys.readouterr().out
    source = write(tmp_path / "good.jsonl", *alike)
    assert batch(source, "-o", out, "-m", tiny) == 0
    used = [each["response"]["body"]["usage"]["prompt_tokens"] for each in read(out)]
    assert sum(used) == figures["prompt_tokens"]


# -- processes --------------------------------------------------------------------------------------------------------
def test_standard_input(tmp_path: Path, tiny: Path, killer: ModuleType) -> None:
    out = tmp_path / "out.jsonl"
    arguments = killer.command(Path("-"), out, str(tiny))
    for _ in range(2):
        done = subprocess.run(arguments, input=b'{"prompt": "x", "max_tokens": 2}\n', capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert ids(out) == ["line-1"]


def test_killed_three_times_it_ends_as_if_undisturbed(tmp_path: Path, tiny: Path, killer: ModuleType) -> None:
    found = killer.compare(tmp_path, str(tiny), lines=60, kills=3, seed=int(time.time()))
    assert found["jsonl lines"] == 58 and found["errors.jsonl lines"] == 2
    for name in ("jsonl", "errors.jsonl"):
        assert found[f"{name} lost"] == found[f"{name} extra"] == 0, found


def test_ctrl_c_keeps_what_is_answered(tmp_path: Path, tiny: Path, killer: ModuleType) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    killer.write_input(source, 400)
    arguments = [word for word in killer.command(source, out, str(tiny)) if word != "--quiet"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while killer.written(out) < 3:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        err = process.stderr.read()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "Interrupted. What is answered is kept; run the same command again to go on."
    assert "Traceback" not in err and 3 <= len(set(ids(out))) == len(ids(out)) < 392


def test_a_terminal_sees_a_line_of_progress(tmp_path: Path, tiny: Path, home: dict[str, str]) -> None:
    source = write(tmp_path / "in.jsonl", *({"prompt": f"of {n}", "max_tokens": 40} for n in range(2000)))
    words = [str(source), "-o", str(tmp_path / "out.jsonl"), "-m", str(tiny), "--threads", "1"]
    program = [sys.executable, "-m", "cli.main", "batch", *words]
    opened = Terminal(program, home)
    try:
        opened.wait(lambda: "/2,000 lines · " in opened.text() and " left" in opened.text())
        opened.send("\x03")
        assert opened.exit_code() == 130
        assert "run the same command again" in " ".join(opened.lines())
    finally:
        opened.close()
