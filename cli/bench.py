"""`kimi-local bench`: what this machine's memory allows, then what the kernels reach."""

import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from cli.output import make_console

bench_app = typer.Typer(
    help="Measure this machine; the physical ceiling is printed first, JSON last.", no_args_is_help=True
)


FORCED = {  # compile for an older CPU: LLVM's name and features for Numba
    "avx2": ("haswell", "+avx2,+fma,+bmi,+bmi2,+popcnt,+f16c"),
    "avxvnni": ("alderlake", "+avx2,+avxvnni,+fma,+bmi,+bmi2,+popcnt,+f16c"),
    "generic": ("nehalem", "+sse4.2,+popcnt"),
}


@bench_app.command()
def kernels(
    gigabytes: Annotated[float, typer.Option("--gb", min=0.1, help="Distinct experts to sweep, in GB.")] = 4.2,
    threads: Annotated[str, typer.Option(help="Thread counts, with commas; default 1 and all cores.")] = "",
    formats: Annotated[str, typer.Option("--format", help="Formats, with commas; default all.")] = "",
    batch: Annotated[str, typer.Option(help="Tokens per expert, with commas.")] = "1",
    passes: Annotated[int, typer.Option(min=1, help="Timed passes per row; medians are reported.")] = 7,
    isa: Annotated[str, typer.Option(help="Force a kernel family: avx2, avxvnni or generic.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print only the JSON line.")] = False,
) -> None:
    """Multiply K2.5-sized experts out of memory, in random order.

    Batches above 32 are computed twice: by the kernels, and decoded for torch to multiply.

    Examples: kimi-local bench kernels · kimi-local bench kernels --json --isa avx2 --threads 2
    """
    force(isa)
    from hybrid.device import default_threads
    from hybrid.memory.many import torch_gemm
    from quant.bench import FORMATS, measure
    from quant.cpu import CPU_NAME, ISA

    names = _names("--format", formats, FORMATS)

    counts = _numbers("--threads", threads) or sorted({1, default_threads()})
    out = make_console(sys.stdout)
    batches = _numbers("--batch", batch)
    results = measure(
        names, gigabytes, counts, batches, passes, lambda text: typer.echo(text, err=True), make_gemm=torch_gemm
    )
    head = next(results)
    if not as_json:
        _print_ceiling(out, CPU_NAME, ISA, head)
        for n, by_batch in head.get("ceiling_gflops", {}).items():
            for size, gflops in by_batch.items():
                out.print(f"  {n} threads  {gflops:7.1f} GFLOP/s, {gflops / 2:.1f} Gweights/s: torch, batch {size}")
        out.print("format      path     bpw  threads batch     GB/s  share  Gweights/s  rel. error")
    rows = []
    for row in results:
        rows.append(row)
        if not as_json:
            out.print(
                f"{row['format']:11} {row['path']:6} {row['bpw']:5.3f} {row['threads']:7} {row['batch']:5} "
                f"{row['gbps']:8.2f} {row['share']:6.1%} {row['gweights_s']:11.2f} {row['rel_err']:11.5f}"
            )
    typer.echo(json.dumps({**head, "rows": rows}))


@bench_app.command()
def linear(
    megabytes: Annotated[float, typer.Option("--mb", min=1, help="Of matrices of each shape and format.")] = 1024,
    threads: Annotated[str, typer.Option(help="Thread counts, with commas; default 1 and all cores.")] = "",
    batch: Annotated[str, typer.Option(help="Tokens at once, with commas.")] = "1",
    passes: Annotated[int, typer.Option(min=1, help="Timed passes per row; medians are reported.")] = 5,
    isa: Annotated[str, typer.Option(help="Force a kernel family: avx2, avxvnni or generic.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print only the JSON line.")] = False,
) -> None:
    """Multiply the matrices every token needs, at K2.5's shapes, in bf16, int8 and INT4.

    Without a GPU they are half of what a token reads.

    Examples: kimi-local bench linear · kimi-local bench linear --batch 1,16 --threads 2 --json
    """
    force(isa)
    from hybrid.device import default_threads
    from quant.bench_linear import measure_linear
    from quant.cpu import CPU_NAME, ISA

    counts = _numbers("--threads", threads) or sorted({1, default_threads()})
    out = make_console(sys.stdout)
    results = measure_linear(
        megabytes, counts, _numbers("--batch", batch), passes, lambda text: typer.echo(text, err=True)
    )
    head = next(results)
    if not as_json:
        _print_ceiling(out, CPU_NAME, ISA, head)
        out.print("matrix                   format   threads batch     GB/s  share Gweights/s")
    rows = []
    for row in results:
        rows.append(row)
        if not as_json:
            out.print(
                f"{row['shape']:24} {row['format']:8} {row['threads']:7} {row['batch']:5} "
                f"{row['gbps']:8.2f} {row['share']:6.1%} {row['gweights_s']:10.2f}"
            )
    typer.echo(json.dumps({**head, "rows": rows}))


def _print_ceiling(out: Console, cpu: str, isa: str, head: dict[str, Any]) -> None:
    out.print(f"{cpu}, {isa} kernels. Physical ceiling, plain reading of the same memory:")
    for n, gbps in head["ceiling_gbps"].items():
        out.print(f"  {n} threads  {gbps:7.2f} GB/s")


@bench_app.command()
def formats(
    weights: Annotated[str, typer.Option(help="Weights of each kind to encode, e.g. 64M.")] = "15M",
    threads: Annotated[int | None, typer.Option(help="Matrices encoded at once; default all cores.")] = None,
    isa: Annotated[str, typer.Option(help="Force a kernel family: avx2, avxvnni or generic.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print only the JSON line.")] = False,
) -> None:
    """What every format loses, and how fast it is written.

    Errors are squared, relative to the weights' own, so that 1 is nothing kept; `bits` count every scale.
    """
    force(isa)
    millions = _millions(weights)
    from hybrid.device import default_threads
    from quant.bench_formats import PEERS, measure_formats

    out = make_console(sys.stdout)
    if not as_json:
        out.print("No format can do better than 2^(-2 bits) on Gaussian weights: 0.0625 at 2 bits.")
        out.print("format                          bits    Gaussian  INT4-rounded  heavy tails  M weights/s/core")
    rows = []
    for row in measure_formats(millions, threads or default_threads(), lambda text: typer.echo(text, err=True)):
        rows.append(row)
        if not as_json:
            out.print(
                f"{row['format']:30} {row['bpw']:6.4f} {row['mse_gauss']:10.5f} {row['mse_int4']:13.5f} "
                f"{row['mse_heavy']:12.5f} {row['encode_mw_s_core']:17.2f}"
            )
    if not as_json:
        out.print("for comparison, measured with their own quantizers:")
        for name, (bits, gauss, int4) in PEERS.items():
            out.print(f"{name:30} {bits:6.4f} {gauss:10.5f} {int4:13.5f}")
    typer.echo(json.dumps({"rows": rows}))


def _millions(text: str) -> float:
    units = {"k": 1e-3, "m": 1.0, "g": 1e3}
    try:
        value = float(text[:-1]) * units[text[-1:].lower()] if text[-1:].isalpha() else float(text) / 1e6
    except (ValueError, KeyError):
        value = 0.0
    if value <= 0:
        raise typer.BadParameter(f"{text!r} is not a number of weights, e.g. 64M.", param_hint="--weights")
    return value


def force(isa: str) -> None:
    """Numba reads these when it is first imported, which is after this."""
    if not isa:
        return
    if isa not in FORCED:
        raise typer.BadParameter(f"{isa!r}: choose one of {', '.join(FORCED)}.", param_hint="--isa")
    os.environ["NUMBA_CPU_NAME"], os.environ["NUMBA_CPU_FEATURES"] = FORCED[isa]


def _names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = [part for part in text.split(",") if part] or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r}: choose from {', '.join(known)}.", param_hint=option)
    return names


def _numbers(option: str, text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",") if part]
    except ValueError:
        values = [0]
    if any(value < 1 for value in values):
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers.", param_hint=option)
    return values
