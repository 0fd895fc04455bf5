"""Train the pocket model: Kimi K2.5 with 20 million parameters, on two CPU cores in two hours.

    python tools/train_pocket.py prepare /tmp/pocket/data
    python tools/train_pocket.py train /tmp/pocket/data --out /tmp/pocket/run --minutes 120 --threads 2
    python tools/train_pocket.py export /tmp/pocket/run /tmp/pocket/model --data /tmp/pocket/data

`train` and `branch`, when interrupted, continue if given again. `plot RUN... PNG` draws what their logs say.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pocket.export import export as write_model
from pocket.plot import plot as draw
from pocket.qat import BITS
from pocket.state import CHECKPOINT, FROZEN_SHARE, SETTINGS, TAU, Settings, State
from pocket.train import branch as new_branch
from pocket.train import seconds_per_step
from pocket.train import train as train_run

from hybrid.errors import KimiError

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True, rich_markup_mode=None)
Threads = Annotated[int, typer.Option(help="Parts of a batch computed at the same time; the result is the same.")]
ANY_STEPS = 1 << 30


@app.command()
def prepare(
    data: Path,
    downloads: Annotated[Path | None, typer.Option(help="Keep or find the downloaded packages here.")] = None,
) -> None:
    """Make the tokenizer and the training text."""
    from pocket.prepare import prepare as make

    make(data, downloads)


@app.command()
def train(
    data: Path,
    out: Annotated[Path, typer.Option(help="Directory of the run; one that exists is continued.")],
    steps: Annotated[int | None, typer.Option(help="How many steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Instead: as many as take this long, measured first.")] = None,
    batch: Annotated[int, typer.Option(help="Rows per step.")] = Settings.rows,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = Settings.length,
    shard: Annotated[int, typer.Option(help="Rows computed together.")] = Settings.shard_rows,
    lr: Annotated[float, typer.Option(help="Learning rate of the plateau.")] = Settings.lr,
    clip: Annotated[bool, typer.Option(help="QK-Clip.")] = True,
    tau: Annotated[float, typer.Option(help="Largest attention logit it allows.")] = TAU,
    decay_share: Annotated[float, typer.Option(help="Last part of the run, in which the rate falls.")] = 0.3,
    qat_share: Annotated[float, typer.Option(help="Last part of the run, with experts in INT4.")] = 0.15,
    seed: int = 0,
    threads: Threads = 1,
) -> None:
    """Train, or continue a run that was interrupted (its settings then stand, whatever the options say)."""
    from pocket.dataset import Dataset

    if not (out / SETTINGS).exists():
        common = {"rows": batch, "length": length, "shard_rows": shard, "lr": lr, "tau": tau if clip else None}
        plan = partial(_plan, decay_share=decay_share, qat_share=qat_share, seed=seed, **common)
        if steps is None:
            if minutes is None:
                raise KimiError("How long to train is not said.", "Give --steps or --minutes.")
            steps = int(minutes * 60 / seconds_per_step(plan(ANY_STEPS), Dataset(data, seed), threads))
        out.mkdir(parents=True, exist_ok=True)
        plan(steps).save(out)
    train_run(out, Dataset(data, Settings.load(out).seed), threads)
    print(out)


def _plan(steps: int, *, decay_share: float, qat_share: float, **common: Any) -> Settings:
    decay_from, qat_from, freeze_from = (round(steps * (1 - share)) for share in (decay_share, qat_share, FROZEN_SHARE))
    return Settings(steps=steps, decay_from=decay_from, qat_from=qat_from, freeze_from=freeze_from, **common)


@app.command()
def branch(
    run: Path,
    data: Path,
    out: Path,
    steps: Annotated[int | None, typer.Option(help="How many more; without it, RUN's own end and rates.")] = None,
    checkpoint: Annotated[str, typer.Option(help="File of the run to start from.")] = CHECKPOINT,
    plateau: Annotated[int, typer.Option(help="So many of them before the rate falls.")] = 0,
    lr: Annotated[float | None, typer.Option(help="Another rate from here on.")] = None,
    qat_steps: Annotated[int, typer.Option(help="So many of them, the last, with experts in INT4.")] = 0,
    qat_bits: Annotated[int, typer.Option(min=2, max=4, help="Fewer bits than INT4, kept as INT4.")] = BITS,
    threads: Threads = 1,
) -> None:
    """Go on another way from a checkpoint: at another rate, for longer, with INT4 experts at the end or without."""
    from pocket.dataset import Dataset

    if steps is None and (plateau or lr is not None):
        raise KimiError("--plateau and --lr need --steps.", "Say how many steps there are to be.")
    if not (out / SETTINGS).exists():
        new_branch(run, checkpoint, out, steps=steps, qat_steps=qat_steps, plateau=plateau, lr=lr, qat_bits=qat_bits)
    train_run(out, Dataset(data, Settings.load(out).seed), threads)
    print(out)


@app.command()
def export(
    run: Path,
    model: Path,
    data: Annotated[Path, typer.Option(help="Where the tokenizer is.")],
    experts: Annotated[str | None, typer.Option(help="bf16, int4, int3 or int2; default: as trained last.")] = None,
) -> None:
    """Write a model directory as Moonshot releases one."""
    print(write_model(Settings.load(run), State.load(run / CHECKPOINT), data, model, experts=experts))


@app.command()
def plot(runs: list[Path], image: Path) -> None:
    """Loss and largest attention logit of runs (needs matplotlib)."""
    print(draw(runs, image))


@app.command()
def routing(
    model: Path,
    trace: Annotated[Path | None, typer.Option(help="Also record who was chosen, .npz.")] = None,
    tokens: Annotated[int, typer.Option(help="Of each domain.")] = 8192,
    recorded: Annotated[int, typer.Option(help="Tokens of the record.")] = 4096,
) -> None:
    """What the router of a model does: how evenly, and what it keeps apart; one JSON object."""
    from pocket import routing

    figures, traces = routing.measure(model, tokens)
    if trace:
        routing.save_trace(traces, trace, recorded)
    print(json.dumps(figures))


@app.command()
def card(run: Path, data: Path, scores: Path, router: Path, model: Path) -> None:
    """Write the model card: SCORES is what `kimi-local eval --json` said, ROUTER what `routing` did."""
    from pocket.card import card as written

    text = written(run, data, *(json.loads(path.read_text().splitlines()[-1]) for path in (scores, router)))
    (model / "README.md").write_text(text)
    print(model / "README.md")


def main() -> int:
    try:
        app()
    except KimiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
