"""`kimi-local doctor`: is this machine ready, and is that model whole?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from cli.options import Debug
from cli.output import byte_count, count, make_console, printable

if TYPE_CHECKING:
    from hybrid.checkpoint.check import Finding, Scan
    from hybrid.checkpoint.deep import DeepReport
    from hybrid.memory.hardware import Hardware

SHOWN_FINDINGS = 20
MODEL_FAILED = 4
UNBROKEN = 10_000  # columns of a pipe: a path in a log must stay in one piece


class Row(NamedTuple):
    """One checked thing: status is "ok", "note", "warn" or "fail"; the hint says what to do about it."""

    name: str
    status: str
    value: str
    hint: str = ""


_MODEL = "Model to check: a directory, demo or pocket; without one only the machine is."
_DEEP = "Read everything: checksums, NaN, scales."
_WRITE = "After a clean --deep, record a checksum per tensor."


def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=_MODEL, show_default=False)] = None,
    deep: Annotated[bool, typer.Option("--deep", help=_DEEP)] = False,
    write_checksums: Annotated[bool, typer.Option("--write-checksums", help=_WRITE)] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    debug: Debug = False,
) -> None:
    """Check this machine, and a model: names, shapes, dtypes and sizes of every tensor.

    Ends with 0 if nothing failed and with 4 if the model has errors.

      kimi-local doctor

      kimi-local doctor /models/Kimi-K2.5 --deep
    """
    from hybrid.errors import CheckpointError, UsageError
    from hybrid.memory.hardware import probe

    deep = deep or write_checksums
    if deep and model is None:
        raise UsageError("--deep needs a model.", "Name its directory: kimi-local doctor DIR --deep")
    hardware = probe()
    rows = list(environment(hardware))
    if not json_output:
        show("This machine", rows)
    try:
        checked = check_model(model, hardware, deep, write_checksums) if model else None
    except CheckpointError as error:
        if not json_output:
            raise
        print_json(rows, hardware, {"path": model, "ok": False, "error": str(error)})
        raise typer.Exit(MODEL_FAILED) from error
    if json_output:
        print_json(rows, hardware, checked.as_dict() if checked else None)
    elif checked:
        show("The model", checked.rows)
        show_findings(checked.findings)
    if checked and not checked.is_sound:
        raise typer.Exit(MODEL_FAILED)


# -- the machine ------------------------------------------------------------------------------------------------------
def environment(hardware: Hardware) -> Iterator[Row]:
    """The machine as rows; nothing here is a failure, for everything runs, only slower."""
    yield Row("processor", "ok", hardware.cpu_model or "unknown")
    yield _kernel_row(hardware)
    yield Row("threads", "ok", f"{hardware.physical_cores or '?'} cores, {hardware.threads} threads")
    available = f"{byte_count(hardware.ram_total)}, {byte_count(hardware.ram_available)} available"
    yield Row("memory", "ok", available)
    yield Row("swap", "ok", f"{byte_count(hardware.swap_free)} of {byte_count(hardware.swap_total)} free")
    yield _huge_page_row(hardware)
    numa = "" if hardware.numa_nodes < 2 else "use all memory channels: numactl --interleave=all kimi-local ..."
    yield Row("NUMA nodes", "warn" if numa else "ok", str(hardware.numa_nodes or "unknown"), numa)
    yield Row("locked memory", "ok", "unlimited" if hardware.memlock < 0 else byte_count(hardware.memlock))
    yield _cache_row()
    yield from _gpu_rows(hardware)
    libraries = [f"{name} {version}" for name, version in hardware.versions]
    yield Row("software", "ok", ", ".join([f"Python {hardware.python}", *libraries]))


def _kernel_row(hardware: Hardware) -> Row:
    features = " ".join(hardware.cpu_features) or "none known"
    slow = "" if hardware.kernels != "generic" else "experts are slow without AVX2"
    return Row("CPU features", "warn" if slow else "ok", f"kernels: {hardware.kernels or 'unknown'} ({features})", slow)


def _huge_page_row(hardware: Hardware) -> Row:
    setting = hardware.transparent_huge_pages
    hint = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled" if setting == "never" else ""
    return Row("huge pages", "warn" if hint else "ok", setting or "unknown", hint)


def _cache_row() -> Row:
    import platformdirs

    from hybrid.memory.hardware import disk_free

    cache = platformdirs.user_cache_path("kimi-local")
    free = disk_free(cache)
    hint = "the demo model and compiled kernels need about 1 GB" if free < 1e9 else ""
    return Row("cache", "warn" if hint else "ok", f"{cache}, {byte_count(free)} free", hint)


def _gpu_rows(hardware: Hardware) -> Iterator[Row]:
    if not hardware.gpus:
        build = "" if hardware.cuda else "this torch is built without CUDA"
        yield Row("GPU", "note", "none; the CPU does everything", build)
    for gpu in hardware.gpus:
        memory = f"{byte_count(gpu.memory_total)}, {byte_count(gpu.memory_free)} free"
        yield Row("GPU", "ok", f"{gpu.name}, {memory}, compute capability {gpu.capability}, CUDA {hardware.cuda}")


# -- the model --------------------------------------------------------------------------------------------------------
class CheckedModel(NamedTuple):
    """A model's rows and deviations."""

    headers: Scan
    report: DeepReport | None
    rows: list[Row]

    @property
    def findings(self) -> list[Finding]:
        return self.report.findings if self.report else self.headers.findings

    @property
    def is_sound(self) -> bool:
        return all(finding.severity != "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        facts: dict[str, Any] = {
            "path": str(self.headers.path),
            "ok": self.is_sound,
            "architecture": self.headers.config.architecture,
            "shards": len(self.headers.headers),
            "tensors": self.headers.num_tensors,
            "bytes": self.headers.num_bytes,
            "load_bytes": self.headers.load_bytes(),
            "findings": [finding._asdict() for finding in self.findings],
        }
        if self.report:
            counts = ("checked_tensors", "checked_files", "scales", "statistics", "is_verified")
            facts["deep"] = {name: getattr(self.report, name) for name in counts}
            facts["deep"]["conclusion"] = self.report.conclusion()
        return facts


def check_model(model: str, hardware: Hardware, deep: bool, write: bool) -> CheckedModel:
    """Check headers and, if `deep`, every byte; `write` records checksums of a model without errors."""
    headers = scan_any(model)
    report = read_everything(headers) if deep else None
    rows = list(model_rows(headers, hardware))
    if report:
        rows += deep_rows(report)
        if write:
            rows.append(recorded(headers, report))
    return CheckedModel(headers, report, rows)


def recorded(headers: Scan, report: DeepReport) -> Row:
    """Record what was read, where the model does not carry its checksums already."""
    from hybrid.checkpoint import deep, pack_check

    if isinstance(headers, pack_check.PackScan):
        return Row("checksums", "note", "a pack carries its own; nothing was recorded")
    return Row("checksums", "ok", f"recorded in {deep.write_checksums(headers.path, report)}")


def scan_any(model: str) -> Scan:
    """The header check of a model as released, or of a pack."""
    from pathlib import Path

    from cli.streaming import named_directory
    from hybrid.checkpoint import check, is_pack, pack_check

    path = named_directory(model)
    return pack_check.scan_pack(path) if is_pack(Path(path).expanduser()) else check.scan(path)


def read_everything(headers: Scan) -> DeepReport:
    """The deep check, with a progress line on a terminal."""
    from cli.views import StatusLine
    from hybrid.checkpoint import deep, pack_check
    from hybrid.progress import OnProgress, Progress

    def read(*report: OnProgress) -> DeepReport:
        if isinstance(headers, pack_check.PackScan):
            return pack_check.read_pack(headers, *report)
        return deep.read_deep(headers, *report)

    if not sys.stderr.isatty():
        return read()
    line = StatusLine(sys.stderr)

    def show_progress(progress: Progress) -> None:
        line.show("reading", progress)

    try:
        return read(show_progress)
    finally:
        line.clear()


def model_rows(headers: Scan, hardware: Hardware) -> Iterator[Row]:
    config = headers.config
    yield Row("path", "ok", str(headers.path))
    experts = f", {config.n_routed_experts} experts, {config.num_experts_per_tok} active" if config.num_experts else ""
    yield Row("architecture", "ok", f"{config.architecture}: {config.num_hidden_layers} layers{experts}")
    shards = plural(len(headers.headers), "shard")
    size = f"{count(headers.num_tensors)} in {shards}, {byte_count(headers.num_bytes)}"
    yield _verdict_row("tensors", size, headers.findings)
    yield from pack_rows(headers)
    parts = headers.load_bytes()
    need = sum(parts.values())
    value = f"{byte_count(need)} to load: experts {byte_count(parts['routed_experts'])}, "
    value += f"the rest {byte_count(parts['resident'])}"
    lacking = need > hardware.ram_available
    hint = f"{byte_count(hardware.ram_available)} of memory are available here" if lacking else ""
    yield Row("memory", "warn" if lacking else "ok", value, hint)


def pack_rows(headers: Scan) -> Iterator[Row]:
    """What a pack's experts are made of; nothing for other models."""
    from hybrid.checkpoint.pack_check import PackScan

    if isinstance(headers, PackScan):
        manifest = headers.manifest
        names = sorted({name for record in manifest.layers.values() for pair in record.formats for name in pair})
        value = f"{byte_count(manifest.expert_bytes)} in {plural(len(manifest.layers), 'layer')}, "
        yield Row("experts", "ok", f"{value}{manifest.bits_per_weight:.2f} bits per weight: {', '.join(names)}")


def deep_rows(report: DeepReport) -> Iterator[Row]:
    yield _verdict_row("contents", f"{byte_count(report.num_bytes)} read", report.findings)
    statistics = report.statistics
    if report.scales:
        value = ", ".join(f"{count(statistics.get(key, 0))} {key}" for key in ("negative", "zero", "subnormal"))
        yield Row("scales", "ok", f"{count(report.scales)}: {value}")
    if any(name.endswith(".weight_packed") for name in report.checksums):
        yield Row("INT4 codes", "ok", f"{count(statistics.get('lowest_codes', 0))} at -8")
    hint = "" if report.is_verified else "record checksums for the next time: --write-checksums"
    yield Row("checksums", "ok" if report.is_verified else "note", report.conclusion(), hint)


def plural(number: int, word: str) -> str:
    """'1 shard', '64 shards'."""
    return f"{count(number)} {word}{'' if number == 1 else 's'}"


def _verdict_row(name: str, value: str, findings: Iterable[Finding]) -> Row:
    severities = [finding.severity for finding in findings]
    errors, warnings = severities.count("error"), severities.count("warning")
    if errors:
        return Row(name, "fail", value, f"{plural(errors, 'error')}, listed below")
    if warnings:
        return Row(name, "warn", value, f"{plural(warnings, 'warning')}, listed below")
    return Row(name, "ok", value)


# -- output -----------------------------------------------------------------------------------------------------------
_STYLES = {"ok": "green", "note": "quiet", "warn": "notice", "fail": "error"}


def show(title: str, rows: list[Row]) -> None:
    """A table of rows on standard output."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False, title_style="bold")
    for _ in range(3):
        table.add_column(overflow="fold")
    for row in rows:
        value = Text(printable(row.value))
        if row.hint:
            value.append(f"\n{printable(row.hint)}", "notice" if row.status == "warn" else "quiet")
        table.add_row(row.name, Text(row.status, _STYLES[row.status]), value)
    console = make_console(sys.stdout)
    if not sys.stdout.isatty():
        console.width = UNBROKEN
    with console.capture() as lines:
        console.print(table)
    print("\n".join(line.rstrip() for line in lines.get().splitlines()), end="\n\n")


def show_findings(findings: list[Finding]) -> None:
    """The first deviations, one line each."""
    for finding in findings[:SHOWN_FINDINGS]:
        print(f"{finding.severity}: {finding}")
    if len(findings) > SHOWN_FINDINGS:
        print(f"... and {count(len(findings) - SHOWN_FINDINGS)} more (--json lists all)")


def print_json(rows: list[Row], hardware: Hardware, model: dict[str, Any] | None) -> None:
    """Everything as one JSON object."""
    facts = asdict(hardware) | {"versions": dict(hardware.versions)}
    facts["gpus"] = [gpu._asdict() for gpu in hardware.gpus]
    environment_rows = [row._asdict() for row in rows]
    ok = model is None or bool(model["ok"])
    print(json.dumps({"ok": ok, "environment": environment_rows, "hardware": facts, "model": model}, indent=2))
