"""`kimi-local`: the entry point, and the one place where errors become sentences and exit codes."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from cli.batch import batch
from cli.bench import bench_app
from cli.calibrate import calibrate
from cli.chat import chat
from cli.compare import compare
from cli.doctor import doctor
from cli.eval import evaluate
from cli.options import ENVIRONMENT, Debug
from cli.output import tolerate_narrow_encodings
from cli.plan import plan
from cli.pull import pull
from cli.quantize import quantize
from cli.serve import serve
from cli.stats import stats
from hybrid.errors import INTERRUPTED, KimiError

CLOSED_PIPE = 141  # what the shell reports for a program that SIGPIPE ended

# typer carries its own copy of click from 0.29 on, and used the package before: the base of its usage errors is found
# from the one class it has always exported.
_UsageError: type[Any] = typer.BadParameter.__mro__[2]


class Commands(TyperGroup):
    """Commands whose errors are printed as one line, unless `--debug` asks for the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            discard_output()
            raise typer.Exit(CLOSED_PIPE) from None
        except (KimiError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            complain(describe(error))
            raise typer.Exit(getattr(error, "exit_code", 1)) from error


def discard_output() -> None:
    """Nobody reads standard output any more: what is still buffered goes nowhere, quietly."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())


def describe(error: KimiError | OSError) -> str:
    if isinstance(error, KimiError) or not error.strerror:
        return str(error)
    return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."


def complain(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"kimi-local {version('kimi-local')}")
        raise typer.Exit


app = typer.Typer(
    name="kimi-local",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Kimi K2.5 on one workstation.

    Examples:
    kimi-local chat                             talk to the demo model
    kimi-local chat /models/Kimi-K2.5           talk to a checkpoint
    kimi-local chat -p "Why is the sky blue?"   one answer, then exit
    kimi-local serve                            the APIs of OpenAI and Anthropic
    kimi-local doctor                           check this machine
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command(epilog=ENVIRONMENT)(chat)
app.command(epilog=ENVIRONMENT)(serve)
app.command()(doctor)
app.command()(plan)
app.command()(pull)
app.command()(quantize)
app.command()(compare)
app.command()(calibrate)
app.command()(stats)
app.command("eval")(evaluate)
app.command()(batch)
app.add_typer(bench_app, name="bench")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command; always ends in SystemExit with the documented code."""
    tolerate_narrow_encodings()
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="kimi-local", standalone_mode=False)
    except _UsageError as error:
        complain(error.format_message())
        sys.exit(2)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def program() -> NoReturn:
    """`main` as a process. Ended by Ctrl-C it ends with 130, and not by the signal.

    Where an interrupt has passed through code that a library had Python execute, which importing torch does, Python
    remembers it as unhandled and ends by the signal whatever becomes of it (_Py_UnhandledKeyboardInterrupt).
    """
    try:
        main()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads it
                    stream.flush()
            os._exit(INTERRUPTED)
        raise


if __name__ == "__main__":
    program()
