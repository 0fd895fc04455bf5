"""How fast a machine moves and multiplies: given, measured on this one, or nominal.

GB/s are 1e9 bytes per second, kernel speeds 1e9 weights per second and core. The table of kernel speeds was measured on
two cores of a Zen 4 EPYC (`kimi-local bench kernels`, figures in dev/LOG.md); other processors' cores are taken to be
like them at the same instruction set, which the ranges of predictions allow for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hybrid.memory.gpus import find
from hybrid.memory.hardware import Hardware, available_ram, cpu_features, probe, total_ram, usable_threads
from hybrid.memory.remembered import recall, remember

# What programs reach: of plain reading by the CPU kernels, of a card's nominal bandwidth, of its nominal arithmetic.
CPU_SHARE, GPU_SHARE, TFLOPS_SHARE = 0.85, 0.85, 0.6
DEFAULT_DISK, DEFAULT_PCIE, DEFAULT_RAM = 3.5, 25.0, 50.0
UNKNOWN_CARD = (800.0, 70.0)  # GB/s and TFLOPS
# A step's fixed costs per layer, seconds: small operations on a CPU, launches and the meeting of CPU and GPU.
CPU_LAYER, GPU_LAYER = 0.9e-3, 0.15e-3

# Decoding one token: every weight is read once.
_DECODE: dict[str, dict[str, float]] = {
    "avx512vnni": {"trellis1": 36, "trellis1_5": 35, "trellis2": 36, "trellis2_5": 18, "trellis3": 20, "int4_g32": 80},
    "avx2": {"trellis1": 25, "trellis1_5": 25, "trellis2": 22, "trellis2_5": 12.5, "trellis3": 11.7, "int4_g32": 45},
    "generic": {"trellis1": 6, "trellis1_5": 6, "trellis2": 5, "trellis2_5": 3, "trellis3": 3, "int4_g32": 10},
}
_DECODE_OTHER = {"bf16": 10.0, "resident bf16": 16.0, "resident int8": 45.0, "resident int4": 45.0, "scores": 15.0}
# A chunk of many tokens: weights times tokens.
_PREFILL: dict[str, float] = {
    "trellis1": 185,
    "trellis1_5": 185,
    "trellis2": 185,
    "trellis2_5": 90,
    "trellis3": 90,
    "int4_g32": 129,
}
_PREFILL_OTHER = {"bf16": 60, "resident bf16": 60, "resident int8": 110, "resident int4": 110, "scores": 40}
_PREFILL_SHARE = {"avx512vnni": 1.0, "avx2": 0.5, "generic": 0.1}


@dataclass(frozen=True)
class Rates:
    """Speeds of one machine. `spread` is the relative uncertainty of all of them."""

    cores: int
    ram: float  # GB/s, plain reading by all cores
    disk: float
    pcie: float
    vram: float
    tflops: float
    decode: Mapping[str, float] = field(default_factory=dict)  # G weights/s per core, by format
    prefill: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.25
    sources: Mapping[str, str] = field(default_factory=dict)  # of ram, disk, pcie, vram, kernels: given, measured, ...

    def scaled(self, factor: float) -> "Rates":
        """All speeds times `factor`."""
        return replace(
            self,
            **{name: getattr(self, name) * factor for name in ("ram", "disk", "pcie", "vram", "tflops")},
            decode={name: speed * factor for name, speed in self.decode.items()},
            prefill={name: speed * factor for name, speed in self.prefill.items()},
        )


def rates(
    hardware: Hardware,
    *,
    ram: float | None = None,
    disk: float | None = None,
    pcie: float | None = None,
    measured: Mapping[str, float] | None = None,
    ram_source: str = "given",
) -> Rates:
    """Speeds of `hardware`: bandwidths in GB/s as given, else nominal; `measured` kernels, per core, replace the table.

    Pure: nothing is measured here.
    """
    card = find(hardware.gpus[0].name) if hardware.gpus else None
    isa = {"avxvnni": "avx2"}.get(hardware.kernels, hardware.kernels)
    isa = isa if isa in _DECODE else "generic"
    share = _PREFILL_SHARE[isa]
    sources = {
        "ram": ram_source if ram else "assumed",
        "disk": "given" if disk else "assumed",
        "pcie": "given" if pcie else "nominal" if card else "assumed",
        "vram": "nominal" if card else "assumed",
        "kernels": "measured" if measured else "nominal",
    }
    bandwidth, tflops = (card.gbps, card.tflops) if card else UNKNOWN_CARD
    return Rates(
        cores=max(1, min(hardware.physical_cores or hardware.threads, hardware.threads or hardware.physical_cores)),
        ram=ram or DEFAULT_RAM,
        disk=disk or DEFAULT_DISK,
        pcie=pcie or (card.pcie_gbps if card else DEFAULT_PCIE),
        vram=bandwidth * GPU_SHARE,
        tflops=tflops * TFLOPS_SHARE,
        decode={**_DECODE[isa], **_DECODE_OTHER, **(measured or {})},
        prefill={name: speed * share for name, speed in {**_PREFILL, **_PREFILL_OTHER}.items()},
        spread=0.12 if measured and ram_source == "measured" else 0.25,
        sources=sources,
    )


# -- this machine -----------------------------------------------------------------------------------------------------
def this_machine(with_gpu: bool = True) -> Hardware:
    """The facts a plan needs; torch, which takes seconds, is asked for a GPU only where a driver is present."""
    if with_gpu and any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
        return probe()
    import psutil

    import quant

    return Hardware(
        kernels=quant.ISA,
        cpu_features=cpu_features(),
        physical_cores=psutil.cpu_count(logical=False) or 0,
        threads=usable_threads(),
        ram_total=total_ram(),
        ram_available=available_ram(),
    )


def _cache_file() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("kimi-local") / "kernel-speeds.json"


def _key(threads: int) -> str:
    import platform

    import quant

    return f"{platform.node()} {quant.ISA} {threads}"


def kernel_speeds(threads: int) -> dict[str, float]:
    """G weights/s per core that `measure_kernels` found here with `threads` threads; empty if it never ran."""
    try:
        known = recall(_cache_file())[_key(threads)]
        return {str(name): float(speed) for name, speed in known.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def measure_kernels(
    threads: int, report: Callable[[str], None], hidden: int = 7168, intermediate: int = 2048, gigabytes: float = 0.4
) -> dict[str, float]:
    """Time a decode step's experts in every format, `gigabytes` of them, and remember; half a minute by default."""
    import numpy as np

    from quant.bench import FORMATS, Pass, Shape, random_layer

    rng, found = np.random.default_rng(0), {}
    for name in FORMATS:
        report(f"measuring {name}")
        layer = random_layer(name, gigabytes, rng, Shape(hidden, intermediate))
        sweep = Pass(layer, 1, rng)
        sweep.seconds(threads)  # compiles
        seconds = min(sweep.seconds(threads) for _ in range(5))
        found[name] = round(sweep.bytes / layer.expert_bytes * layer.shape.weights / seconds / 1e9 / threads, 2)
    _remember(threads, found)
    return found


def _remember(threads: int, found: dict[str, float]) -> None:
    """Keep `found`; where that is impossible it is measured again when asked again."""
    path = _cache_file()
    remember(path, {**recall(path), _key(threads): found})
