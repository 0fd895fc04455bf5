"""What a step leaves for people: a line of JSON every few steps, one line on the terminal."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass
class Measured:
    """One step in numbers. No count of tokens an expert had no room for: there is room for all."""

    step: int
    tokens: int
    loss: float  # nats per predicted token
    accuracy: float  # share of predicted tokens that were the best guess
    grad_norm: float
    largest: list[float]  # attention logit by layer
    clipped: int  # heads
    load: float  # of the busiest expert over the mean, in the worst layer
    entropy: float  # of the experts' loads over that of equal loads, mean of layers
    seconds: float = math.nan

    @classmethod
    def of(
        cls,
        step: int,
        tokens: int,
        loss: float,
        accuracy: float,
        norm: float,
        largest: Tensor,
        clipped: int,
        loads: Tensor,
    ) -> "Measured":
        """From the largest logits [layers, heads] and loads [moe layers, experts]."""
        shares = loads.double() / loads.sum(1, keepdim=True)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum(1).mean() / math.log(loads.shape[1])
        busiest = float(shares.max()) * loads.shape[1]
        by_layer = [round(value, 2) for value in largest.amax(1).tolist()]
        return cls(step, tokens, loss, accuracy, norm, by_layer, clipped, busiest, float(entropy))


class Log:
    """A file of JSON lines that continues at `step`: lines of steps to be done again are removed."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.tokens = path, 0
        kept = [line for line in read_log(path) if line["step"] <= step] if path.exists() else []
        if kept:
            self.tokens = kept[-1]["tokens"]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._since: list[Measured] = []

    def add(self, measured: Measured, rate: float, every: int) -> None:
        """Write a line of means and maxima after every `every` steps."""
        self._since.append(measured)
        if measured.step % every:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(self._line(rate)) + "\n")
        self._since = []

    def _line(self, rate: float) -> dict[str, Any]:
        steps, last = self._since, self._since[-1]
        tokens = sum(step.tokens for step in steps)
        self.tokens += tokens
        return {
            "step": last.step,
            "tokens": self.tokens,
            "loss": round(sum(step.loss for step in steps) / len(steps), 5),
            "accuracy": round(sum(step.accuracy for step in steps) / len(steps), 5),
            "lr": rate,
            "grad_norm": round(max(step.grad_norm for step in steps), 4),
            "max_logit": [max(layer) for layer in zip(*(step.largest for step in steps), strict=True)],
            "clipped": sum(step.clipped for step in steps),
            "load": round(last.load, 3),
            "entropy": round(last.entropy, 5),
            "tok_s": round(tokens / sum(step.seconds for step in steps)),
        }


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; an unfinished last one, left by a kill, is ignored."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line.endswith("}")]


def show(measured: Measured, steps: int) -> None:
    """One line that replaces itself, on a terminal only."""
    if not sys.stderr.isatty():
        return
    minutes = (steps - measured.step) * measured.seconds / 60
    speed = measured.tokens / measured.seconds
    text = f"step {measured.step:,}/{steps:,}  loss {measured.loss:.3f}  right {measured.accuracy:.1%}"
    text += f"  {speed:,.0f} tok/s  {minutes:.0f} min to go"
    print(f"\r\x1b[K{text}", end="\n" if measured.step == steps else "", file=sys.stderr, flush=True)
