from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from cli.prompt import Pastes, Prompt, _Completer, is_open, unfenced


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


@pytest.fixture
def prompt(keys: PipeInput, tmp_path: Path) -> Prompt:
    return Prompt({"/help": ()}, tmp_path / "state" / "history", input=keys, output=DummyOutput())


def test_long_pastes_fold_and_unfold() -> None:
    pastes = Pastes()
    assert pastes.collapse("short\ntext") == "short\ntext"
    assert pastes.collapse("\n".join("x" * 15)) == "\n".join("x" * 15)
    long = "\n".join("x" * 84)
    assert pastes.collapse(long) == "[Pasted text #1, 84 lines]"
    assert pastes.collapse("y" * 1001) == "[Pasted text #2, 1 line]"
    assert pastes.expand("a [Pasted text #1, 84 lines] b [Pasted text #2, 1 line]") == f"a {long} b {'y' * 1001}"
    assert pastes.expand("[Pasted text #9, 3 lines]") == "[Pasted text #9, 3 lines]"


@pytest.mark.parametrize(
    "text, opened", [('"""', True), ('"""a\nb', True), ('"""a"""', False), ("a", False), ('""""', True)]
)
def test_fences(text: str, opened: bool) -> None:
    assert is_open(text) is opened


def test_unfenced() -> None:
    assert unfenced('"""\na\nb\n"""') == "a\nb"
    assert unfenced('say """ twice') == 'say """ twice'


def test_history_keeps_the_text_of_pastes(prompt: Prompt, keys: PipeInput, tmp_path: Path) -> None:
    text = "\n".join("x" * 20)
    keys.send_bytes(f"see \x1b[200~{text}\x1b[201~\r".encode())
    assert prompt.read() == f"see {text}"
    again = Prompt({}, tmp_path / "state" / "history", input=keys, output=DummyOutput())
    keys.send_bytes(b"\x1b[A\r")
    assert again.read() == f"see {text}"


def test_a_draft_can_be_sent_as_it_is(prompt: Prompt, keys: PipeInput) -> None:
    keys.send_bytes(b" more\r")
    assert prompt.read("a draft") == "a draft more"


def test_control_d_and_control_c(prompt: Prompt, keys: PipeInput) -> None:
    keys.send_bytes(b"\x04")
    with pytest.raises(EOFError):
        prompt.read()
    keys.send_bytes(b"half\x03\x03")
    with pytest.raises(KeyboardInterrupt):
        prompt.read()


def test_keys_typed_ahead_come_first(prompt: Prompt, keys: PipeInput) -> None:
    prompt.type_ahead("one\rtwo")
    assert prompt.read() == "one"
    keys.send_bytes(b"!\r")
    assert prompt.read() == "two!"


def test_the_editor_sees_the_whole_paste(
    prompt: Prompt, keys: PipeInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nsed -i "s/x/y/" "$1"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    text = "\n".join("x" * 20)
    keys.send_bytes(f"\x1b[200~{text}\x1b[201~\x07".encode())

    import threading

    threading.Timer(2.0, lambda: keys.send_bytes(b"\r")).start()
    assert prompt.read() == "\n".join("y" * 20)


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    commands = {"/read": ("PATH",), "/retry": (), "/think": ("on", "off"), "/load": ("SESSION",)}
    completer = _Completer(commands, lambda: ["2026-a", "2026-b", "2025-c"])

    def complete(text: str) -> list[str]:
        return [c.text for c in completer.get_completions(Document(text), None)]  # type: ignore[arg-type]

    assert complete("/re") == ["/read", "/retry"]
    assert complete("/think o") == ["on", "off"]
    assert complete("/load 2026") == ["2026-a", "2026-b"]
    assert complete("/read no") == ["tes.txt"]
    assert complete("what is ./no") == ["tes.txt"]
    assert complete("hello no") == []
