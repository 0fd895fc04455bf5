"""`kimi-local plan`: will it fit, how fast will it be, and what to type."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import KV, Debug, GpuExperts, RamBudget, parse_bytes, parse_tokens
from cli.plan_view import Lines, show
from hybrid.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from hybrid.memory.achieved import Compared
    from hybrid.memory.hardware import Gpu, Hardware
    from hybrid.memory.known import Known
    from hybrid.memory.plan import MemoryPlan
    from hybrid.memory.rates import Rates

_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*([mgt]?)b?(?:/s|ps)?", re.IGNORECASE)
LAST = "last"
_GBPS = {"m": 1e-3, "": 1.0, "g": 1.0, "t": 1e3}


class Resident(StrEnum):
    auto = "auto"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


_MODEL = "k2.5, k2-thinking, demo, pocket, a config.json or a directory with one."
_VRAM = "Memory of the graphics card, as 24GiB; 0 for none. Without it, this machine's."
_RAM = "Memory, as 256GiB. Without it, this machine's."
_GPU = "A card by name, as 4090 or RTX 3090: its memory and nominal speeds."
_EXPERTS = "auto, native, a format such as trellis2 or int4_g32, or bits per weight such as 1.9."
_RESIDENT = "What every token reads; auto takes bf16 where there is room for it."
_NVME = "Whether experts may stay on a drive."
_MEASURE = "Time this machine's kernels first, and remember; a minute where they must be compiled."
_COMPARE = "Show predicted beside achieved: a JSON record of a run, or `last` for the model's last conversation."


def plan(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=_MODEL)] = "k2.5",
    vram: Annotated[str | None, typer.Option("--vram", metavar="SIZE", help=_VRAM, show_default=False)] = None,
    ram: Annotated[str | None, typer.Option("--ram", metavar="SIZE", help=_RAM, show_default=False)] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help=_GPU, show_default=False)] = None,
    cores: Annotated[int | None, typer.Option("--cores", min=1, help="Of the processor.", show_default=False)] = None,
    ram_bw: Annotated[str | None, typer.Option("--ram-bw", metavar="SPEED", help="As 75GB/s.")] = None,
    disk_bw: Annotated[str | None, typer.Option("--disk-bw", metavar="SPEED", help="Of the drive, as 7GB/s.")] = None,
    pcie_bw: Annotated[str | None, typer.Option("--pcie-bw", metavar="SPEED", help="To the card, as 25GB/s.")] = None,
    ctx: Annotated[str | None, typer.Option("--ctx", metavar="TOKENS", help="Context, as 32k.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at once, each with such a context.")] = 1,
    experts: Annotated[str, typer.Option("--experts", metavar="FORMAT", help=_EXPERTS)] = "auto",
    resident: Annotated[Resident, typer.Option("--resident", help=_RESIDENT)] = Resident.auto,
    kv: Annotated[KV, typer.Option("--kv", help="Format of the KV cache; auto is bf16.")] = KV.auto,
    reserve: Annotated[
        str | None, typer.Option("--reserve", metavar="SIZE", help="RAM left to the system; 3 GiB and 3 % by default.")
    ] = None,
    nvme: Annotated[bool, typer.Option("--nvme/--no-nvme", help=_NVME)] = True,
    ram_budget: RamBudget = None,
    gpu_experts: GpuExperts = None,
    measure: Annotated[bool, typer.Option("--measure", help=_MEASURE)] = False,
    record: Annotated[Path | None, typer.Option("--compare", metavar="FILE", help=_COMPARE, show_default=False)] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    debug: Debug = False,
) -> None:
    """Say whether a model fits a machine, where every part would live and how fast it would be.

    Nothing is downloaded or loaded: a configuration is enough. What is not given is taken from this machine. Ends with
    3 if it does not fit, after the nearest plans that do.

      kimi-local plan

      kimi-local plan k2.5 --gpu 4090 --ram 256GiB --ram-bw 75GB/s --disk-bw 7GB/s --cores 16
    """
    machine = _machine(vram, ram, gpu, cores)
    speeds = _speeds(machine, parse_bandwidth(ram_bw), parse_bandwidth(disk_bw), parse_bandwidth(pcie_bw), measure)
    from hybrid.memory.achieved import compare
    from hybrid.memory.known import options_for
    from hybrid.memory.kv_format import kind_of
    from hybrid.memory.plan import make_plan

    recorded = _recorded(record, model) if record else {}
    found = _known(model)
    options = options_for(
        found,
        machine,
        ctx=parse_tokens(ctx) if ctx else None,
        batch=batch,
        experts=experts,
        resident=resident.value,
        kv=kind_of(kv.value, full=False),
        reserve=parse_bytes(reserve) if reserve else None,
        nvme=nvme,
        ram_budget=ram_budget,
        gpu_experts=gpu_experts,
    )
    made = make_plan(found.config, machine, options, speeds=speeds)
    lines = Lines(run_lines(made, found), reproduction(model, machine, made))
    rows = compare(made, recorded)
    if json_output:
        print(json.dumps(as_json(model, made, lines, rows), indent=2))
    else:
        show(model, made, lines, rows)
    if not made.fits:
        _refuse(model, made)


def _refuse(model: str, made: MemoryPlan) -> None:
    gib = made.placement.lacks / (1 << 30)
    raise DoesNotFit(
        f"{model} does not fit: {gib:,.1f} GiB ({made.placement.lacks / 1e9:,.1f} GB) of RAM are missing.",
        f"Try {made.nearest[0].change}." if made.nearest else "No context, format or drive makes it fit.",
    )


# -- what is asked for ------------------------------------------------------------------------------------------------
def parse_bandwidth(text: str | None) -> float | None:
    """'7GB/s' = '7' = '7000MB/s' = 7.0 GB/s, decimal. Raises UsageError."""
    if text is None:
        return None
    match = _BANDWIDTH.fullmatch(text.strip())
    value = float(match[1]) * _GBPS[match[2].lower()] if match else 0.0
    if not value:
        raise UsageError(f"{text!r} is no bandwidth.", "Write 7GB/s, 3500MB/s or a number of GB/s.")
    return value


def _known(model: str) -> Known:
    from hybrid.memory.known import known
    from hybrid.names import model_path

    path = model_path(model)
    return known(model) if str(path) == model else known(str(path))._replace(directory=model)


def _machine(vram: str | None, ram: str | None, gpu: str | None, cores: int | None) -> Hardware:
    """This machine, with whatever was given in place of its own."""
    from hybrid.memory.rates import this_machine

    here = this_machine(with_gpu=vram is None and gpu is None)
    changes: dict[str, Any] = {}
    if vram is not None or gpu is not None:
        changes["gpus"] = _cards(vram, gpu)
    if ram is not None:
        changes |= {"ram_total": parse_bytes(ram), "ram_available": 0}
    if cores is not None:
        changes |= {"physical_cores": cores, "threads": cores}
    return replace(here, **changes)


def _cards(vram: str | None, gpu: str | None) -> tuple[Gpu, ...]:
    from hybrid.memory.gpus import find_or_refuse
    from hybrid.memory.hardware import Gpu

    if vram is not None and re.fullmatch(r"0(\.0*)?\s*[kmgt]?(i?b)?", vram.strip(), re.IGNORECASE):
        return ()
    card = find_or_refuse(gpu) if gpu is not None else None
    size = parse_bytes(vram) if vram is not None else card.memory if card else 0
    return (Gpu(card.name if card else "", size, size, card.capability if card else ""),)


def _speeds(machine: Hardware, ram: float | None, disk: float | None, pcie: float | None, measure: bool) -> Rates:
    from hybrid.memory.rates import kernel_speeds, measure_kernels, rates, this_machine

    here = rates(this_machine(with_gpu=False))
    if measure:
        measure_kernels(here.cores, lambda what: print(what, file=sys.stderr))
    source = "given"
    if ram is None:
        from hybrid.memory.bandwidth import ram_ceiling_gbps

        ram, source = ram_ceiling_gbps(here.cores), "measured"
    return rates(machine, ram=ram, disk=disk, pcie=pcie, measured=kernel_speeds(here.cores), ram_source=source)


def _recorded(record: Path, model: str) -> dict[str, Any]:
    """What is in the file, or what is known of the last run of `model` if it is called `last`."""
    from hybrid.memory.achieved import read_record, run_file

    if str(record) != LAST or record.exists():
        return read_record(record)
    from hybrid.checkpoint import open_checkpoint
    from hybrid.names import model_path

    with open_checkpoint(model_path(model)) as checkpoint:
        kept = run_file(checkpoint)
    if not kept.exists():
        raise UsageError(f"No run of {model} is on record.", f"Talk to it first: kimi-local chat {model}")
    return read_record(kept)


# -- what is answered -------------------------------------------------------------------------------------------------
def run_lines(made: MemoryPlan, found: Known) -> list[str]:
    """The commands that lead to this plan, a download first for a model that is but a name; none if it does not fit."""
    from hybrid.memory.plan import commands

    if not made.fits:
        return []
    fetch = [f"kimi-local pull {found.repo} --dir {found.directory}"] if found.repo else []
    return fetch + commands(made, found.directory)


def reproduction(model: str, machine: Hardware, made: MemoryPlan) -> str:
    """The same plan with nothing left to the machine."""
    options, speeds = made.options, made.rates
    card = machine.gpus[0] if machine.gpus else None
    words = ["kimi-local", "plan", shlex.quote(model)]
    words += ["--gpu", shlex.quote(card.name)] if card and card.name else []
    words += ["--vram", str(card.memory_total) if card else "0", "--ram", str(machine.ram_total)]
    words += ["--reserve", str(made.placement.ram.parts["system"]), "--cores", str(speeds.cores)]
    words += ["--ram-bw", f"{speeds.ram:.4g}", "--disk-bw", f"{speeds.disk:g}", "--pcie-bw", f"{speeds.pcie:g}"]
    words += ["--ctx", str(options.ctx), "--batch", str(options.batch), "--experts", pinned(made)]
    resident = "auto" if options.as_stored else made.placement.resident
    words += ["--resident", resident, "--kv", options.kv, "" if options.nvme else "--no-nvme"]
    words += [] if options.ram_budget is None else ["--ram-budget", str(options.ram_budget)]
    words += [] if options.gpu_experts is None else ["--gpu-experts", str(options.gpu_experts)]
    return " ".join(word for word in words if word)


def pinned(made: MemoryPlan) -> str:
    """What --experts must say so that nothing is left to choose; a pack's are what they are."""
    names = list(made.placement.mix.names())
    if made.options.stored is not None:
        return "auto"
    if names in ([], ["bf16"]):
        return "native"
    return names[0] if len(names) == 1 else f"{made.bpw:.9f}"


def as_json(model: str, made: MemoryPlan, lines: Lines, rows: list[Compared]) -> dict[str, Any]:
    """The whole plan."""
    command = {"command": " && ".join(lines.run), "reproduce": lines.again}
    achieved = {row.name: {**row._asdict(), "ratio": round(row.ratio, 4)} for row in rows}
    return {"model": model, **made.as_dict(), **command} | ({"compared": achieved} if rows else {})
