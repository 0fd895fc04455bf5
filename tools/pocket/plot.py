"""Curves of training runs, side by side: loss, and the largest attention logit."""

from collections.abc import Sequence
from pathlib import Path

from hybrid.errors import KimiError, MissingExtra
from pocket.record import read_log
from pocket.state import LOG


def series(run: Path) -> tuple[list[int], list[float], list[float]]:
    """Tokens seen, loss, and largest logit of any layer, at every line of a run's log."""
    try:
        lines = read_log(run / LOG)
    except FileNotFoundError as error:
        raise KimiError(f"{run} has no {LOG}.", "Give directories of training runs.") from error
    return (
        [line["tokens"] for line in lines],
        [line["loss"] for line in lines],
        [max(line["max_logit"]) for line in lines],
    )


def plot(runs: Sequence[Path], image: Path) -> Path:
    """Draw all `runs` into one PNG. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("Plots need matplotlib.", "Run: pip install matplotlib") from error
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, logit = figure.subplots(2, 1, sharex=True)
    for run in runs:
        tokens, losses, logits = series(run)
        loss.plot(tokens, losses, label=run.name)
        logit.plot(tokens, logits, label=run.name)
    loss.set(ylabel="loss, nats per token", yscale="log")
    logit.set(ylabel="largest attention logit", xlabel="tokens", yscale="log")
    loss.legend()
    figure.savefig(image, dpi=120)
    return image
