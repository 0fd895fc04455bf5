"""`kimi-local calibrate`: what a text makes of a model's experts, for quantizing them well."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Debug, Threads
from cli.output import count
from cli.streaming import Text, Tokens, Window, open_model, progress_line, read_texts, windows_of
from hybrid.errors import Retry

_MODEL = "A directory, demo or pocket."
_OUT = "Directory to write; the same command continues one that is unfinished."


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)],
    text: Text,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help=_OUT, show_default=False)],
    tokens: Tokens = None,
    ctx: Window = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Record how a model routes and what its experts see, on texts of the kind it will be used for.

    Runs one layer at a time, in fp32, so the model need not fit in memory.
    The same command continues a run that was stopped, to the same bytes.
    The last line printed is the path.

      kimi-local calibrate /models/Kimi-K2.5 --text code.txt --text prose.txt --tokens 64k -o k2.5-calibration
    """
    from hybrid.device import use_threads
    from hybrid.model.calibrate import calibrate as run

    texts = read_texts(text)
    names = [(path.name, digest) for path, (_, digest) in zip(text, texts, strict=True)]
    with progress_line() as report, open_model(model, report) as checkpoint:
        windows = windows_of(checkpoint, [content for content, _ in texts], ctx, tokens)
        try:
            directory = run(
                checkpoint, windows, names, out.expanduser(), threads=use_threads(threads), on_progress=report
            )
        except KeyboardInterrupt as stop:
            raise Retry(f"Stopped; {out} keeps the layers that are done.", "The same command continues.") from stop
    print(f"{count(len(windows) * len(windows[0]))} tokens", file=sys.stderr)
    print(directory)
