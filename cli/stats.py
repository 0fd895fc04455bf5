"""`kimi-local stats`: which experts a model has chosen, in all its runs on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Debug, ModelArgument
from cli.output import count, make_console
from cli.streaming import open_model, progress_line
from hybrid.errors import KimiError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from hybrid.checkpoint import Checkpoint

SHADES = " ▁▂▃▄▅▆▇█"
BESIDE = 30  # columns of a line that are not heat

_JSON = "One JSON object, with the counts of every expert."
_RESET = "Forget what was recorded of this model."


def stats(
    model: ModelArgument = None,
    json_output: Annotated[bool, typer.Option("--json", help=_JSON)] = False,
    reset: Annotated[bool, typer.Option("--reset", help=_RESET)] = False,
    debug: Debug = False,
) -> None:
    """Show which experts a model has chosen: one line per layer, expert 0 on the left.

    Recorded by every chat without --no-stats; what RAM cannot hold is chosen by it.

      kimi-local stats /models/k2.5-pack
    """
    from hybrid.memory.router_stats import stats_file

    with progress_line() as report, open_model(model or "demo", report) as checkpoint:
        path, name = stats_file(checkpoint), checkpoint.path.resolve().name
        found = recorded(checkpoint, path)
    if reset:
        forget(path)
        print(f"Forgot {count(found['choices'])} choices of {name}.", file=sys.stderr)
    elif json_output:
        print(json.dumps({"model": name, "file": str(path)} | found))
    elif not found["choices"]:
        print(f"Nothing is recorded of {name} yet: chat with it.")
    else:
        show(name, found)


def recorded(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """What --json prints, less the model's name and the file."""
    from math import log2

    from hybrid.memory.router_stats import layer_heat, read_counts

    config = checkpoint.config
    counts = read_counts(path, config)
    layers = []
    for layer in config.moe_layers:
        heat, row = layer_heat(counts[layer]), counts[layer].tolist()
        figures = {"choices": heat.choices, "top10_share": heat.hot_share, "entropy_bits": heat.entropy}
        layers.append({"layer": layer} | figures | {"counts": row})
    most = log2(config.n_routed_experts) if config.n_routed_experts else 0.0
    return {"choices": int(counts.sum()), "even_entropy_bits": most, "layers": layers}


def forget(path: Path) -> None:
    """Remove the file. Raises KimiError where that is not allowed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise KimiError(f"{path}: {error.strerror}.", "Nothing was forgotten.") from error


def show(name: str, found: dict[str, Any]) -> None:
    console = make_console(sys.stdout)
    console.print(f"{name}: {count(found['choices'])} choices of experts", style="bold")
    console.print(heat_table(found["layers"], console.width))
    even = found["even_entropy_bits"]
    console.print(f"top 10%: their share of the choices; {even:.2f} bits: all experts alike", style="quiet")


def heat_table(layers: Sequence[dict[str, Any]], width: int) -> Table:
    """One row per layer; the fuller a cell, the more often its experts were chosen, on one scale for all layers."""
    from rich.table import Table

    rows = [bucketed(layer["counts"], max(4, min(len(layer["counts"]), width - BESIDE))) for layer in layers]
    top = max(max(row) for row in rows)
    table = Table(box=None, pad_edge=False, header_style="quiet")
    for title in ("layer", "top 10%", "bits"):
        table.add_column(title, justify="right", style="quiet", no_wrap=True)
    table.add_column("heat", style="yellow", no_wrap=True)
    for layer, row in zip(layers, rows, strict=True):
        shades = "".join(SHADES[-int(-8 * value // top)] for value in row)
        figures = f"{layer['top10_share']:.0%}", f"{layer['entropy_bits']:.2f}"
        table.add_row(str(layer["layer"]), *figures, shades)
    return table


def bucketed(counts: Sequence[int], cells: int) -> list[float]:
    """Means over `cells` runs of neighbours, as equally long as can be."""
    bounds = [len(counts) * i // cells for i in range(cells + 1)]
    return [sum(counts[a:b]) / (b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
