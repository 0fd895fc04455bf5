"""A stand-in for `Kimi` whose replies are written in the question, for tests of drawing and keys.

Run as a program it is `kimi-local chat` on that model: `python scripted.py [OPTIONS]`. In a question `prefill:2` waits
two seconds over the prompt, `think:30` thinks thirty tokens, `delay:0.01` takes so long per token, `say:NAME` picks an
answer of ANSWERS and `fail:nan` raises the engine's error; without any of these the question is echoed.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hybrid.chat.message import Message, Part, Text, Think, ToolCall
from hybrid.errors import ContextExceeded, KimiError
from hybrid.progress import OnProgress, Progress
from hybrid.stats import Stats

MARKDOWN = """# Fruit

Some **bold words** and `code`, then a list:

1. apples from the *north*
2. pears, which are long enough to be wrapped on every narrow terminal there is
3. 漢字と日本語のとても長い文章がここに入ります

```python
def answer(x):
    return x + 42
```

| name | price |
|------|------:|
| kiwi | 3 |
| fig  | 12 |

The end.
"""
ANSWERS = {
    "markdown": MARKDOWN,
    "long": "\n".join(f"{n}. item number {n} of a long list" for n in range(1, 61)) + "\n",
    "code": "```\n" + "\n".join(f"line {n}" for n in range(1, 41)) + "\n```\n",
    "controls": "safe\x1b[31m red\x1b]0;title\x07 \x9b5A end\n",
    "tool": "",
}


@dataclass(frozen=True)
class Params:
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 32768


def figures(prompt_tokens: int) -> Stats:
    """Half a second of prompt, two of decoding at 19 GB/s."""
    read = 38 * 10**9
    return Stats(prompt_tokens, prefill_s=0.5, first_token_s=0.6, decode_s=2.0, expert_bytes=read, host_bytes=read)


def words(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)


@dataclass
class Reply:
    question: str
    stats: Stats
    params: Params
    thinking: bool
    budget: int | None
    on_progress: OnProgress
    finish_reason: str = ""
    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stopped = self._hurried = False
        self._iterator = self._run()

    def option(self, name: str, default: str) -> str:
        match = re.search(rf"\b{name}:(\S+)", self.question)
        return match[1] if match else default

    def __iter__(self) -> Iterator[Part]:
        return self

    def __next__(self) -> Part:
        part = next(self._iterator)
        self.parts.append(part)
        return part

    def stop(self) -> None:
        self._stopped = True

    def answer_now(self) -> None:
        self._hurried = True

    @property
    def message(self) -> Message:
        return Message.from_parts(self.parts, interrupted=self.finish_reason == "interrupted")

    def _run(self) -> Iterator[Part]:
        if not self._prefill():
            self.finish_reason = "interrupted"
            return
        if self.option("fail", ""):
            raise KimiError("The model produced values that are not numbers.", "Run doctor.")
        delay = float(self.option("delay", "0"))
        for part in [*self._thoughts(), *self._answer()]:
            if isinstance(part, Think) and (self._hurried or self.stats.thinking_tokens == self.budget):
                continue
            time.sleep(delay)
            if self.stats.generated_tokens == int(self.option("break", "-1")):
                raise KimiError("The server is gone.", "Start it again.")
            if self._stopped:
                self.finish_reason = "interrupted"
                return
            if isinstance(part, Think):
                self.stats.thinking_tokens += 1
            else:
                self.stats.answer_tokens += 1
            yield part
            if self.stats.generated_tokens >= self.params.max_tokens:
                self.finish_reason = "length"
                return
        self.finish_reason = "tool_calls" if self.option("say", "") == "tool" else "stop"

    def _prefill(self) -> bool:
        seconds, total = float(self.option("prefill", "0")), 4000
        for step in range(40):
            if self._stopped:
                return False
            time.sleep(seconds / 40)
            self.on_progress(Progress("prefill", total * (step + 1) // 40, total, "tok"))
        return True

    def _thoughts(self) -> list[Part]:
        count = int(self.option("think", "4")) if self.thinking else 0
        return [Think(f"thought {n} " if n % 10 else f"thought {n}.\n") for n in range(1, count + 1)]

    def _answer(self) -> list[Part]:
        if self.option("say", "") == "tool":
            return [ToolCall("functions.look:0", "look", '{"at": "sky"}')]
        text = ANSWERS.get(self.option("say", ""), f"You said: {self.question}")
        return [Text(word) for word in words(text)]


class ScriptedKimi:
    """What `cli` uses of `hybrid.Kimi`."""

    name = "scripted"
    default_thinking = True
    generation_config: dict[str, Any] = {}

    def __init__(self, ctx: int | None = None) -> None:
        self.ctx = ctx or 32768
        self.path = Path("/nowhere/scripted")
        self.config = SimpleNamespace(
            num_hidden_layers=3, n_routed_experts=8, num_experts_per_tok=2, max_position_embeddings=1 << 18
        )
        self.tokenizer = SimpleNamespace(encode=words)
        self.asked: list[list[Message]] = []

    def __enter__(self) -> ScriptedKimi:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def default_params(self, thinking: bool) -> Params:
        return Params(temperature=1.0 if thinking else 0.6)

    def count_tokens(self, messages: list[Message], tools: object = None, thinking: bool | None = None) -> int:
        return sum(4 + len(words(message.content)) for message in messages)

    def reply(
        self,
        messages: list[Message],
        params: Params | None = None,
        *,
        tools: object = None,
        thinking: bool = True,
        think_budget: int | None = None,
        keep: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Reply:
        needed = self.count_tokens(messages)
        if needed >= self.ctx:
            raise ContextExceeded(f"The prompt needs {needed} tokens of context and there are {self.ctx}.")
        self.asked.append(list(messages))
        stats = figures(needed)
        report = on_progress or (lambda progress: None)
        return Reply(messages[-1].content, stats, params or Params(), thinking, think_budget, report)

    def expert_report(self) -> dict[str, Any]:
        return {"layers": [1, 2], "counts": [[9, 0, 0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 2, 1, 1, 2]]}

    def ram_ceiling_gbps(self) -> float:
        return 25.0


def main() -> None:
    import cli.chat
    from cli.main import main as program

    run = cli.chat.run_chat
    cli.chat.run_chat = lambda options: run(options, lambda options, on_progress: ScriptedKimi(options.ctx))
    program(["chat", *sys.argv[1:]])


if __name__ == "__main__":
    main()
