"""`kimi-local serve`: the model behind HTTP, for programs that speak OpenAI's or Anthropic's API."""

from __future__ import annotations

import os
import sys
import threading
import time
import webbrowser
from typing import Annotated, Any

import typer

from cli import options as o
from cli.keys import leaving_on_interrupt
from cli.opening import load_kimi, open_with_status, servers_directory, waiting
from cli.options import Activations, ChatOptions, option
from hybrid.errors import MissingExtra, UsageError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
PORT, PARALLEL, QUEUE = 8080, 4, 32
_HOST = "Address to listen on; one that others can reach wants --api-key."
_KEY = "What clients must send; best given as KIMI_LOCAL_API_KEY."


def serving(*names: str, help: str, **more: Any) -> Any:
    return option(*names, help=help, rich_help_panel="Server", **more)


def serve(
    context: typer.Context,
    model: o.ModelArgument = None,
    host: Annotated[str, serving("--host", metavar="HOST", show_default=True, help=_HOST)] = "127.0.0.1",
    port: Annotated[
        int, serving("--port", metavar="PORT", min=0, max=65535, show_default=True, help="0 picks a free one.")
    ] = PORT,
    api_key: Annotated[str | None, serving("--api-key", metavar="KEY", help=_KEY)] = None,
    parallel: Annotated[
        int, serving("--parallel", metavar="N", min=1, max=256, show_default=True, help="Answers made at once.")
    ] = PARALLEL,
    queue: Annotated[
        int, serving("--queue", metavar="N", min=0, show_default=True, help="Requests that may wait for their turn.")
    ] = QUEUE,
    open_page: Annotated[bool, serving("--open", help="Show its web page in the browser.")] = False,
    ctx: o.Ctx = None,
    threads: o.Threads = None,
    device: o.Device = None,
    activations: o.ActivationsOption = Activations.int8,
    ram_budget: o.RamBudget = None,
    kv: o.KvOption = o.KV.auto,
    kv_disk: o.KvDisk = None,
    speculate: o.SpeculateOption = o.Speculate.off,
    verify: o.Verify = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Serve a model to programs, and to browsers as a web page: chat, experts at work, memory.

    Programs find chat/completions, completions, responses and messages, streamed or whole.

    Examples:
    kimi-local serve                                   the demo model, at http://127.0.0.1:8080
    kimi-local serve --open                            the same, with its page in your browser
    kimi-local serve /models/Kimi-K2.5 --ctx 64k       a checkpoint
    KIMI_LOCAL_API_KEY=... kimi-local serve --host 0.0.0.0    for other machines
    """
    if host not in LOOPBACK and not api_key:
        raise UsageError(f"{host} can be reached by others.", "Set --api-key, or listen on 127.0.0.1.")
    try:
        with leaving_on_interrupt(), waiting("Starting", quiet=quiet):
            from hybrid.names import DEMO
            from hybrid.running import Running, announced, from_here
            from hybrid.serve.app import Settings
            from hybrid.serve.server import Server, bind, url
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name} is not installed.", "Run: pip install 'kimi-local[serve]'.") from error
    chosen = ChatOptions(
        model=model, ctx=ctx, threads=threads, device=device, activations=activations, ram_budget=ram_budget,
        kv=kv, kv_disk=kv_disk, speculate=speculate, verify=verify, quiet=quiet,
    )  # fmt: skip
    with bind(host, port) as bound, open_with_status(chosen, load_kimi) as kimi:
        address = url(bound)

        def ready() -> None:
            print(f"Serving {kimi.name} at {address} (Ctrl-C ends).", flush=True)
            if open_page:  # some browsers return only when they are closed
                threading.Thread(target=show_page, args=(address,), name="browser", daemon=True).start()

        settings = Settings(host=host, api_key=api_key, parallel=parallel, queue=queue)
        record = Running(from_here(address), os.getpid(), model or DEMO, str(kimi.path.resolve()), time.time())
        server = Server(kimi, settings, on_ready=ready)
        with announced(servers_directory(), record):
            server.run(sockets=[bound])


def show_page(address: str) -> None:
    """Open `address` in the user's browser, or say that there is none."""
    try:
        shown = webbrowser.open(address)
    except webbrowser.Error:
        shown = False
    if not shown:
        print(f"No browser could be opened. Open {address} in one.", file=sys.stderr)
