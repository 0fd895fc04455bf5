"""A terminal to test in: a pseudo-terminal with a screen behind it that can be read."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pexpect
import pyte
import pytest
import torch
from safetensors.torch import load_file, save_file

import hybrid
from cli.opening import load_kimi
from cli.options import ChatOptions
from hybrid.checkpoint.tiny import make_tiny

SCRIPTED = Path(__file__).with_name("scripted.py")
PROMPT = re.compile(r"^> ?$")


class _Screen(pyte.HistoryScreen):
    """Answers the terminal's questions (cursor position) like a real one."""

    reply: Callable[[str], object]

    def write_process_input(self, data: str) -> None:
        self.reply(data)


class Terminal:
    """A program on a terminal of `columns` x `rows`."""

    def __init__(self, command: list[str], environment: dict[str, str], columns: int = 80, rows: int = 24) -> None:
        self.screen = _Screen(columns, rows, history=5000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self.child = pexpect.spawn(
            command[0], command[1:], env=environment, dimensions=(rows, columns), timeout=30, echo=True
        )
        self.child.delaybeforesend = None
        self.screen.reply = self.child.send
        self.raw = b""
        # kept open, so that the terminal can be asked for its modes when the program is gone
        self._tty = os.open(os.readlink(f"/proc/{self.child.pid}/fd/0"), os.O_RDWR | os.O_NOCTTY)

    def feed(self, seconds: float = 0.05) -> bool:
        """Take what the program writes within `seconds`; False when it has ended."""
        try:
            data = self.child.read_nonblocking(65536, timeout=seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True

    def lines(self) -> list[str]:
        """Scrollback and screen, without trailing blanks."""
        above = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
        text = [line.rstrip() for line in above + list(self.screen.display)]
        while text and not text[-1]:
            text.pop()
        return text

    def text(self) -> str:
        return "\n".join(self.lines())

    def wait(self, wanted: str | Callable[[], bool], timeout: float = 40.0) -> None:
        """Until `wanted` can be read, or is true."""
        reached = wanted if callable(wanted) else lambda: wanted in self.text()
        end = time.monotonic() + timeout
        while not reached():
            alive = self.feed()
            if time.monotonic() > end or (not alive and not reached()):
                raise AssertionError(f"waited for {wanted!r} in vain:\n{self.text()}")

    def wait_thinking(self, tokens: int = 5) -> None:
        """Until at least so many tokens are thought."""
        self.wait(lambda: any(int(n) >= tokens for n in re.findall(r"Thinking… \((\d+) tok", self.text())))

    def wait_prompt(self, timeout: float = 40.0) -> None:
        """Until the cursor stands behind an empty prompt."""
        self.wait(lambda: bool(PROMPT.match(self.screen.display[self.screen.cursor.y].rstrip() + " ")), timeout)

    def send(self, text: str) -> None:
        self.child.send(text)

    def ask(self, text: str) -> None:
        self.wait_prompt()
        self.send(text + "\r")

    def exit_code(self, timeout: float = 20.0) -> int:
        """Wait for the program's end; minus the signal's number where one ended it."""
        end = time.monotonic() + timeout
        while self.child.isalive():
            self.feed()
            assert time.monotonic() < end, f"still running:\n{self.text()}"
        self.feed()
        return self.child.exitstatus if self.child.exitstatus is not None else -(self.child.signalstatus or 0)

    def modes(self) -> tuple[bool, bool]:
        """(echo, line editing) of the terminal."""
        flags = termios.tcgetattr(self._tty)[3]
        return bool(flags & termios.ECHO), bool(flags & termios.ICANON)

    def cook(self) -> None:
        """Give the terminal echo and line editing."""
        mode = termios.tcgetattr(self._tty)
        mode[3] |= termios.ECHO | termios.ICANON
        termios.tcsetattr(self._tty, termios.TCSANOW, mode)

    def close(self) -> None:
        os.close(self._tty)
        self.child.close(force=True)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment with a home of its own; kernels compiled before are found where they are."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("KIMI_LOCAL_", "XDG_STATE"))}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        kept.pop(name, None)
    kept["KIMI_LOCAL_KV_DISK"] = "0"  # the cache is the one of whoever runs the tests
    return kept | {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm-256color", "LANG": "C.UTF-8"}


@pytest.fixture
def terminal(home: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    """Start the program on a terminal: `terminal(*options, scripted=True, columns=80, rows=24)`."""
    opened: list[Terminal] = []

    def start(*options: str, scripted: bool = True, columns: int = 80, rows: int = 24, **more: str) -> Terminal:
        program = [str(SCRIPTED)] if scripted else ["-m", "cli.main", "chat"]
        opened.append(Terminal([sys.executable, *program, *options], home | more, columns, rows))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.fixture
def load_settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What `load_kimi(options)` gives to `Kimi.load` beside the model."""

    def settings_of(options: ChatOptions) -> dict[str, Any]:
        given: dict[str, Any] = {}
        model = SimpleNamespace(tokenizer=object())
        monkeypatch.setattr(hybrid.Kimi, "load", lambda _, **settings: given.update(settings) or model)
        load_kimi(options, lambda progress: None)
        return given

    return settings_of


@pytest.fixture(scope="session")
def scripted() -> ModuleType:
    """The module with ScriptedKimi."""
    spec = importlib.util.spec_from_file_location("scripted", SCRIPTED)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scripted"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that is slow enough to be stopped and, at temperature 0, never ends a thought or a turn."""
    directory = make_tiny(
        tmp_path_factory.mktemp("models") / "talker", config={"num_hidden_layers": 12, "max_position_embeddings": 65536}
    )
    raw = json.loads((directory / "config.json").read_text())["text_config"]
    for shard in directory.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith("lm_head.weight"):
                first_special = raw["vocab_size"] - 256
                tensor[first_special:] = torch.zeros_like(tensor[first_special:])  # logit 0: never the largest
        save_file(tensors, shard, metadata={"format": "pt"})
    return directory
