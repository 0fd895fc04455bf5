"""`kimi-local compare`: how far one model's answers are from another's, in nats, on a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import KV, Activations, Debug, Threads, machine
from cli.output import count, print_table
from cli.streaming import (
    Text,
    Tokens,
    Window,
    open_model,
    progress_line,
    read_texts,
    require_one_vocabulary,
    windows_of,
)

if TYPE_CHECKING:
    from hybrid.model.compare import Comparison

_A = "The model that is right: a directory, demo or pocket."
_B = "The model that is judged."
_ACTIVATIONS = "int8: each as it runs in chat; float32: everything in fp32, so that only weights differ."
_KV = "How B's context is kept in memory, A's as it is computed: a model against itself shows what fp8 or int8 costs."
_JSON = "The last line is one JSON object, with figures per layer; nothing else is printed."


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=_A, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help=_B, show_default=False)],
    text: Text,
    tokens: Tokens = None,
    ctx: Window = None,
    kv: Annotated[KV, machine("--kv", env=False, help=_KV, show_default=True)] = KV.auto,
    activations: Annotated[Activations, machine("--activations", env=False, help=_ACTIVATIONS, show_default=True)] = (
        Activations.int8
    ),
    threads: Threads = None,
    json_output: Annotated[bool, typer.Option("--json", help=_JSON)] = False,
    debug: Debug = False,
) -> None:
    """Compare two models that share a vocabulary, on a text.

    Runs both one layer at a time, so neither needs to fit in memory.
    Use text that neither was calibrated on.

      kimi-local compare /models/Kimi-K2.5 /models/packed --text held-out.txt --tokens 16k

      kimi-local compare demo demo --kv fp8 --text held-out.txt
    """
    from hybrid.device import use_threads
    from hybrid.model.compare import compare as run
    from hybrid.model.streamed import on_cpu

    texts = [content for content, _ in read_texts(text)]
    with progress_line() as report, open_model(a, report) as first, open_model(b, report) as second:
        require_one_vocabulary(first, second)
        windows = windows_of(
            min((first, second), key=lambda each: each.config.max_position_embeddings), texts, ctx, tokens
        )
        residence = on_cpu(activations.value, use_threads(threads))
        result = run(first, second, windows, residence, report, kv=kv.value)
    if json_output:
        print(json.dumps(result.as_dict()))
    else:
        reduced = "" if kv is KV.auto else f" with a KV cache in {kv.value}"
        print_table(f"KL(A || B), A {first.path.name}, B {second.path.name}{reduced}", rows(result))


def rows(result: Comparison) -> Iterator[tuple[str, str]]:
    """What each figure is, and the figure."""
    spread = "" if result.kl_stderr is None else f" ± {result.kl_stderr:.5f}"
    yield "tokens", count(result.tokens)
    yield "KL, nats per token: mean", f"{result.kl_mean:.5f}{spread}"
    yield "median", f"{result.kl_median:.5f}"
    yield "99th percentile", f"{result.kl_p99:.5f}"
    yield "largest", f"{result.kl_max:.5f}"
    yield "same likeliest token", f"{result.top1:.2%}"
    if result.ppl_a is not None and result.ppl_b is not None:
        yield "perplexity of A", f"{result.ppl_a:.4f}"
        yield "perplexity of B", f"{result.ppl_b:.4f} ({result.ppl_b / result.ppl_a - 1:+.2%})"
    if result.router_overlap is not None:
        yield "experts chosen in common", f"{result.router_overlap:.2%}"
    if result.layers:
        last = result.layers[-1]
        yield "relative error of the last hidden state", f"{last.hidden_error:.4f}"
