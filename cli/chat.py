"""`kimi-local chat`: a conversation on a terminal, or one answer for a pipe."""

from __future__ import annotations

import sys

import typer

from cli import options as o
from cli.attaching import attach_or_load
from cli.opening import OpenKimi
from cli.options import Activations, ChatOptions
from hybrid.errors import UsageError


def chat(
    context: typer.Context,
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    prompt: o.Prompt = None,
    system: o.System = None,
    system_file: o.SystemFile = None,
    continue_: o.Continue = False,
    session: o.Session = None,
    no_history: o.NoHistory = False,
    think: o.Think = None,
    think_budget: o.ThinkBudget = None,
    temp: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    min_p: o.MinP = None,
    seed: o.Seed = None,
    max_tokens: o.MaxTokens = None,
    ctx: o.Ctx = None,
    threads: o.Threads = None,
    device: o.Device = None,
    activations: o.ActivationsOption = Activations.int8,
    ram_budget: o.RamBudget = None,
    gpu_experts: o.GpuExperts = None,
    kv: o.KvOption = o.KV.auto,
    kv_disk: o.KvDisk = None,
    speculate: o.SpeculateOption = o.Speculate.off,
    verify: o.Verify = False,
    attach: o.Attach = "auto",
    api_key: o.ApiKey = None,
    json: o.Json = False,
    stream_json: o.StreamJson = False,
    stats: o.Stats = None,
    quiet: o.Quiet = False,
    raw: o.Raw = False,
    no_stream: o.NoStream = False,
    hide_thinking: o.HideThinking = False,
    debug: o.Debug = False,
) -> None:
    """Talk to a model, or ask it one thing.

    Examples:
    kimi-local chat                                    talk to the demo model
    kimi-local chat /models/Kimi-K2.5 --ctx 64k        talk to a checkpoint
    kimi-local chat --attach http://mybox:8080         talk to a server's model
    kimi-local chat -p "Why is the sky blue?"          one answer on stdout
    cat report.txt | kimi-local chat -p "Sum it up."   standard input comes first
    kimi-local chat -c                                 continue the last talk
    kimi-local chat -p "2+2?" --json | jq .text        for programs
    """
    given = dict(locals())
    for name in ("context", "model_option", "debug"):
        del given[name]
    if model and model_option and context.get_parameter_source("model").name == "COMMANDLINE":  # type: ignore[union-attr]
        raise UsageError(f"Two models are named: {model} and {model_option}.", "Name one.")
    given["model"] = model_option or model
    code = run_chat(ChatOptions(**given, origins=o.origins(context)))
    raise typer.Exit(code)


def run_chat(options: ChatOptions, open_kimi: OpenKimi = attach_or_load) -> int:
    """Chat as asked; returns the exit code. `open_kimi` gives the model."""
    check(options)
    text = None if is_interactive(options) else one_shot_prompt(options)
    if text is None:
        from cli.interactive import run_repl

        return run_repl(options, open_kimi)
    from cli.oneshot import answer_once

    return answer_once(options, text, open_kimi)


def check(options: ChatOptions) -> None:
    """Raises UsageError for options that contradict each other."""
    pairs = [
        (options.continue_ and options.session, "--continue and --session"),
        (options.system is not None and options.system_file, "--system and --system-file"),
        (options.json and options.stream_json, "--json and --stream-json"),
    ]
    for both, names in pairs:
        if both:
            raise UsageError(f"{names} cannot be used together.", "Choose one.")


def is_interactive(options: ChatOptions) -> bool:
    """Whether to hold a conversation. Raises UsageError where one was meant and cannot be shown."""
    if options.prompt is not None or not has_terminal_input():
        return False
    if options.json or options.stream_json:
        raise UsageError("--json and --stream-json answer one question.", "Give it with -p or on standard input.")
    if not sys.stdout.isatty():
        raise UsageError("A conversation needs a terminal to be shown on.", "Give one question with -p.")
    return True


def has_terminal_input() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()  # None when the file descriptor is closed


def one_shot_prompt(options: ChatOptions) -> str:
    """Standard input, a blank line and -p, as far as they are there. Raises UsageError when nothing is."""
    piped = ""
    if sys.stdin is not None and (options.prompt == "-" or not has_terminal_input()):
        piped = sys.stdin.buffer.read().decode("utf-8", "replace").rstrip("\n")
    asked = options.prompt if options.prompt not in (None, "-") else ""
    parts = [part for part in (piped, asked) if part and part.strip()]
    if not parts:
        raise UsageError("There is no question.", "Give one with -p TEXT or on standard input.")
    return "\n\n".join(parts)
