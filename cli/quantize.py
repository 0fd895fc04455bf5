"""`kimi-local quantize`: a released checkpoint into a pack that fits this machine's memory."""

from __future__ import annotations

import json
import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from cli.options import KV, Debug, parse_bytes, parse_tokens
from cli.output import byte_count, count, duration, is_drawable, make_console, rate
from cli.streaming import named_directory
from hybrid.errors import UsageError

if TYPE_CHECKING:
    from hybrid.convert import PartDone, Reports, Settings
    from hybrid.progress import Progress


class ExpertFormat(StrEnum):
    trellis = "trellis"
    int4 = "int4"


class Resident(StrEnum):
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


_SRC = "Model directory as released: INT4, fp8 or bf16 experts; or demo or pocket."
_DST = "The pack: a new directory."
_RAM = "Memory the model may use, as 256GiB; without --bits or --mix this machine's."
_BITS = "Bits per expert weight, as 1.8, scales included."
_MIX = "A format for all experts, as trellis2 or gate_up=trellis1_5,down=trellis2."
_FORMAT = "int4 keeps INT4 experts without loss."
_RESIDENT = "What every token reads: as stored, or its large matrices in 8 or 4 bits."
_CALIBRATION = "What kimi-local calibrate made of SRC: less error at the same size."
_CTX = "With --ram: tokens of context to leave room for."
_KV = "With --ram: how the KV cache of these will be kept; auto is bf16."
_DELETE = "Delete each shard of SRC once all of it is safely in the pack."
_REPORT = "Only show what the pack PACK lost, layer by layer."


def quantize(
    source: Annotated[Path | None, typer.Argument(metavar="SRC", help=_SRC, show_default=False)] = None,
    target: Annotated[Path | None, typer.Argument(metavar="DST", help=_DST, show_default=False)] = None,
    ram: Annotated[str | None, typer.Option("--ram", metavar="SIZE", help=_RAM, show_default=False)] = None,
    bits: Annotated[float | None, typer.Option("--bits", metavar="B", min=0.5, help=_BITS, show_default=False)] = None,
    mix: Annotated[str | None, typer.Option("--mix", metavar="NAMES", help=_MIX, show_default=False)] = None,
    format: Annotated[ExpertFormat, typer.Option("--format", help=_FORMAT)] = ExpertFormat.trellis,
    resident: Annotated[Resident, typer.Option("--resident", help=_RESIDENT)] = Resident.bf16,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="DIR", help=_CALIBRATION, show_default=False)
    ] = None,
    ctx: Annotated[str, typer.Option("--ctx", metavar="TOKENS", help=_CTX)] = "32k",
    kv: Annotated[KV, typer.Option("--kv", help=_KV)] = KV.auto,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Cores to use.", show_default=False)] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=(1 << 24) - 1, help="Of the random rotations.")] = 0,
    delete_source: Annotated[bool, typer.Option("--delete-source", help=_DELETE)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take and give.")] = False,
    report: Annotated[Path | None, typer.Option("--report", metavar="PACK", help=_REPORT, show_default=False)] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    debug: Debug = False,
) -> None:
    """Turn a released checkpoint into a pack of experts with fewer bits.

    It can be stopped at any moment; the same command continues. Ends with 3 if memory or disk are too small. Of the
    memory given by --ram, 6 GiB stay with the system; resident weights and the KV cache of --ctx tokens come off too.

      kimi-local quantize /models/Kimi-K2.5 /models/Kimi-K2.5-pack --ram 256GiB --dry-run

      kimi-local quantize --report /models/Kimi-K2.5-pack
    """
    if report is not None:
        show_report(report.expanduser(), json_output)
        return
    if source is None or target is None:
        raise UsageError("quantize needs SRC and DST.", "See kimi-local quantize --help.")
    directory, target = Path(named_directory(str(source))).expanduser(), target.expanduser()
    if delete_source and directory != source.expanduser():
        raise UsageError(f"--delete-source would delete the model {source}.", "Leave it out.")
    source = directory
    # Experts are encoded one per core; matrix products that each use all cores would wait for one another. NumPy reads
    # this when it is first imported, which is here. A calibrated run took a third of the time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    settings = _settings(ram, bits, mix, format, resident, calibration, ctx, kv, seed)
    if dry_run:
        _dry_run(source, target, settings, threads, delete_source, json_output)
        return
    from hybrid.convert import quantize as convert
    from hybrid.convert import summarise

    meter = Meter(sys.stderr)
    try:
        convert(source, target, settings, threads=threads, delete_source=delete_source, reports=meter.reports())
    except KeyboardInterrupt:
        print(f"\nStopped. Nothing is lost: the same command continues {target}.", file=sys.stderr)
        raise
    finally:
        meter.clear()
    print(f"Check it: kimi-local doctor {target} --deep", file=sys.stderr)
    print(json.dumps(_brief(summarise(target))) if json_output else target)


def _settings(
    ram: str | None,
    bits: float | None,
    mix: str | None,
    format: ExpertFormat,
    resident: Resident,
    calibration: Path | None,
    ctx: str,
    kv: KV,
    seed: int,
) -> Settings:
    from hybrid.convert import INT4, Settings, parse_mix
    from hybrid.memory.kv_format import kind_of

    if format == ExpertFormat.int4 and mix:
        raise UsageError("--mix and --format int4 exclude each other.", "Give one of them.")
    return Settings(
        ram=parse_bytes(ram) if ram else None,
        bits=bits,
        mix=INT4 if format == ExpertFormat.int4 else parse_mix(mix) if mix else None,
        resident=resident.value,
        calibration=calibration.expanduser() if calibration else None,
        seed=seed,
        ctx=parse_tokens(ctx),
        kv=kind_of(kv.value, full=False),
    )


# -- progress ---------------------------------------------------------------------------------------------------------
class Meter:
    """Progress on `stream`: a line that is redrawn on a terminal, one line per finished part elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        from cli.screen import Screen

        self._stream = stream
        self._screen = Screen(stream) if is_drawable(stream) else None
        self._began = time.monotonic()
        self._weights = self._bytes = 0  # of this run
        self._done = self._total = 0

    def reports(self) -> Reports:
        from hybrid.convert import Reports

        return Reports(self.progress, self.part, self.written)

    def written(self, weights: int, count: int) -> None:
        self._weights, self._bytes = self._weights + weights, self._bytes + count

    def progress(self, progress: Progress) -> None:
        from cli.screen import bar_line

        self._done, self._total = progress.done, progress.total
        if self._screen is not None:
            line = bar_line("Quantizing", progress.done, progress.total, self.figures(), self._screen.width)
            self._screen.draw([line])

    def part(self, done: PartDone) -> None:
        if self._screen is None:
            error = "" if done.mean_error is None else f", mean error {done.mean_error:.4f}"
            figures = " · ".join(self.figures())
            line = f"{done.number}/{done.total} {done.part}: {byte_count(done.bytes)}{error} · {figures}"
            print(line, file=self._stream, flush=True)

    def figures(self) -> list[str]:
        """Share of the weights, time left, speed of encoding and of writing."""
        elapsed = max(time.monotonic() - self._began, 1e-9)
        share = f"{self._done / max(1, self._total):.1%}"
        if not self._weights:
            return [share]
        left = duration((self._total - self._done) * elapsed / self._weights)
        speeds = f"{rate(self._weights / 1e6 / elapsed)} M weights/s", f"{rate(self._bytes / 1e6 / elapsed)} MB/s"
        return [share, f"{left} left", *speeds]

    def clear(self) -> None:
        if self._screen is not None:
            self._screen.clear()


# -- what it would take, what it lost ---------------------------------------------------------------------------------
def _dry_run(
    source: Path, target: Path, settings: Settings, threads: int | None, delete_source: bool, json_output: bool
) -> None:
    from hybrid.convert import estimate

    found = estimate(source, target, settings, threads=threads, delete_source=delete_source)
    if json_output:
        print(json.dumps(found))
        return
    total = found["expert_bytes"] + found["resident_bytes"]
    print(f"experts   {byte_count(found['expert_bytes']):>9}  {found['bits_per_weight']:.2f} bits per weight")
    for matrix, formats in found["formats"].items():
        print(f"{'':21}{matrix}: {_counted(formats)}")
    print(f"resident  {byte_count(found['resident_bytes']):>9}  {found['resident']}")
    print(f"total     {byte_count(total):>9}  of {byte_count(found['source_bytes'])}")
    if found["kv_bytes"]:
        print(f"KV cache  {byte_count(found['kv_bytes']):>9}  left to {count(found['ctx'])} tokens in {found['kv']}")
    print(f"disk      {byte_count(found['disk_needed']):>9}  at most, {byte_count(found['disk_free'])} free")
    speed = f"{rate(found['weights_per_s'] / 1e6)} M weights/s with {found['workers']} threads"
    print(f"encoding  {duration(found['seconds']):>9}  predicted, from {speed} just now")


def show_report(path: Path, json_output: bool) -> None:
    """Relative errors of a pack, one line per layer, and its totals."""
    from hybrid.convert import summarise

    summary = summarise(path)
    if json_output:
        print(json.dumps(summary))
        return
    from rich.table import Table

    table = Table("layer", "bits", "gate_up", "mean", "worst", "down", "mean", "worst", box=None, pad_edge=False)
    for layer in summary["layers"]:
        cells = [str(layer["layer"]), f"{layer['bits_per_weight']:.2f}"]
        for matrix in ("gate_up", "down"):
            error = layer[matrix]["error"]
            cells += [_counted(layer[matrix]["formats"]), f"{error['mean']:.4f}", f"{error['worst']:.4f}"]
        table.add_row(*cells)
    console = make_console(sys.stdout)
    console.print(table)
    mean, worst = summary["error"]["mean"], summary["error"]["worst"]
    print(
        f"experts {byte_count(summary['expert_bytes'])}, {summary['bits_per_weight']:.2f} bits per weight, "
        f"relative error {mean:.4f} in the mean, {worst:.4f} at worst; resident {byte_count(summary['resident_bytes'])}"
    )


def _counted(formats: dict[str, int]) -> str:
    """'trellis2', or '12 trellis1_5, 4 trellis2'."""
    if len(formats) == 1:
        return next(iter(formats))
    return ", ".join(f"{count(number)} {name}" for name, number in formats.items())


def _brief(summary: dict[str, Any]) -> dict[str, Any]:
    """Totals without the layers, which --report has."""
    return {name: value for name, value in summary.items() if name != "layers"}
