"""`kimi-local pull`: fetch a model from the hub, after making sure that it fits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Debug
from cli.output import byte_count, count, printable

_DIRECTORY = "Put it there; otherwise into the hub's shared cache."


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub.", show_default=False)],
    directory: Annotated[Path | None, typer.Option("--dir", metavar="DIR", help=_DIRECTORY, show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be downloaded.")] = False,
    debug: Debug = False,
) -> None:
    """Download a model; the same command continues an interrupted download.

    The last line printed is the path. Ends with 3 if it does not fit the disk, with 75 if the connection failed.

      kimi-local pull moonshotai/Kimi-K2.5 --dir /models/Kimi-K2.5
    """
    from hybrid.hub import plan_pull
    from hybrid.hub import pull as download

    plan = plan_pull(repo, directory.expanduser() if directory else None)
    summary = f"{plan.repo}: {count(len(plan.files))} files, {byte_count(plan.total)}"
    summary += f", {byte_count(plan.missing)} to download, {byte_count(plan.free)} free in {plan.target}"
    print(summary, file=sys.stderr)
    if dry_run:
        for file in plan.files:
            print(f"{byte_count(file.size):>10}  {printable(file.name)}")
        plan.require_space()
        return
    path = download(plan)
    print(f"Check it: kimi-local doctor {path}", file=sys.stderr)
    print(path)
