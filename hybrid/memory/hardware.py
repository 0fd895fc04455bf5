"""What this machine has: processor, memory, graphics card. Every fact is optional; looking never fails.

Sizes are bytes. Facts come from /proc, /sys, psutil, llvmlite and torch; where a source is absent the field holds its
empty value, which `doctor` prints as unknown.
"""

import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil

PROC, SYS = Path("/proc"), Path("/sys")
LIBRARIES = ("torch", "numba", "llvmlite", "numpy", "safetensors", "tiktoken", "huggingface-hub")
# Spelt as LLVM does; what the expert kernels can use.
KERNEL_FEATURES = ("avx2", "fma", "avxvnni", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512vbmi")
UNLIMITED = -1

T = TypeVar("T")


class Gpu(NamedTuple):
    """One CUDA device."""

    name: str
    memory_total: int
    memory_free: int
    capability: str  # compute capability, e.g. "8.9"


@dataclass(frozen=True)
class Hardware:
    """The facts of one machine as this process sees it: affinity and memory limits of its container are applied."""

    cpu_model: str = ""
    cpu_features: tuple[str, ...] = ()  # of KERNEL_FEATURES
    kernels: str = ""  # instruction set the expert kernels use: avx512vnni | avxvnni | avx2 | generic
    physical_cores: int = 0
    threads: int = 0  # hardware threads this process may use
    ram_total: int = 0
    ram_available: int = 0
    swap_total: int = 0
    swap_free: int = 0
    transparent_huge_pages: str = ""  # always | madvise | never
    numa_nodes: int = 0
    memlock: int = 0  # bytes this process may pin; UNLIMITED for no bound
    gpus: tuple[Gpu, ...] = ()
    cuda: str = ""  # CUDA version torch was built for; "" for none
    python: str = ""
    versions: tuple[tuple[str, str], ...] = ()  # (library, version) of LIBRARIES that are installed


def probe(proc: Path = PROC, sys_root: Path = SYS) -> Hardware:
    """Look at everything. Takes seconds the first time, because asking for a GPU loads torch."""
    swap = _or(psutil.swap_memory, None)
    return Hardware(
        cpu_model=_cpu_model(proc),
        cpu_features=_or(cpu_features, ()),
        kernels=_or(_kernels, ""),
        physical_cores=_or(lambda: psutil.cpu_count(logical=False), None) or 0,
        threads=usable_threads(),
        ram_total=total_ram(proc, sys_root),
        ram_available=available_ram(proc, sys_root),
        swap_total=swap.total if swap else 0,
        swap_free=swap.free if swap else 0,
        transparent_huge_pages=_huge_pages(sys_root),
        numa_nodes=_numa_nodes(sys_root),
        memlock=_or(_memlock, 0),
        gpus=_or(_gpus, ()),
        cuda=_or(_cuda_build, ""),
        python=platform.python_version(),
        versions=tuple(_versions()),
    )


def available_ram(proc: Path = PROC, sys_root: Path = SYS) -> int:
    """Bytes a new allocation can have without swapping: free memory plus page cache, within the container's limit."""
    bounds = [free for _, free in _container_memory(proc, sys_root)]
    host = _meminfo(proc).get("MemAvailable") or _or(lambda: psutil.virtual_memory().available, 0)
    return max(0, min([host, *bounds]))


def total_ram(proc: Path = PROC, sys_root: Path = SYS) -> int:
    """Installed memory, or the container's limit where that is smaller."""
    bounds = [limit for limit, _ in _container_memory(proc, sys_root)]
    host = _meminfo(proc).get("MemTotal") or _or(lambda: psutil.virtual_memory().total, 0)
    return min([host, *bounds])


def disk_free(path: Path) -> int:
    """Bytes free for `path`, which need not exist yet: asked of its nearest existing parent. 0 if unknown."""

    def look() -> int:
        existing = next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())
        return shutil.disk_usage(existing).free

    return _or(look, 0)


def usable_threads() -> int:
    """Hardware threads this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_features() -> tuple[str, ...]:
    """Those of KERNEL_FEATURES the compiler sees on this processor."""
    import llvmlite.binding

    found = llvmlite.binding.get_host_cpu_features()
    return tuple(name for name in KERNEL_FEATURES if found.get(name))


def _kernels() -> str:
    import quant

    return quant.ISA


def _or(look: Callable[[], T], unknown: T) -> T:
    """`look()`, or `unknown` where the platform lacks what it asks for."""
    try:
        return look()
    except (OSError, ValueError, ImportError, RuntimeError, AttributeError, psutil.Error):
        return unknown


def _read(path: Path) -> str:
    return _or(lambda: path.read_text(errors="replace"), "")


def _meminfo(proc: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = (line.split() for line in _read(proc / "meminfo").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[1].isdigit()}


def _container_memory(proc: Path, sys_root: Path) -> Iterator[tuple[int, int]]:
    """(limit, still available under it) for every memory limit that binds this process, cgroup v2 and v1."""
    for line in _read(proc / "self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            yield from _limits(sys_root / "fs/cgroup", group, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            yield from _limits(sys_root / "fs/cgroup/memory", group, *names)


def _limits(root: Path, group: str, limit_file: str, usage_file: str, prefix: str) -> Iterator[tuple[int, int]]:
    # A limit anywhere above this group binds too; inside a container the named group may not be visible at all.
    names = [Path(group.lstrip("/")), *Path(group.lstrip("/")).parents]
    for directory in dict.fromkeys(root / name for name in names):
        limit = _read(directory / limit_file).strip()
        usage = _read(directory / usage_file).strip()
        if limit.isdigit() and usage.isdigit() and int(limit) < 1 << 60:
            lines = (line.split() for line in _read(directory / "memory.stat").splitlines())
            stat = {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}
            cache = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
            yield int(limit), int(limit) - int(usage) + cache


def _cpu_model(proc: Path) -> str:
    for line in _read(proc / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _huge_pages(sys_root: Path) -> str:
    _, opening, rest = _read(sys_root / "kernel/mm/transparent_hugepage/enabled").partition("[")
    return rest.partition("]")[0] if opening else ""


def _numa_nodes(sys_root: Path) -> int:
    names: list[str] = _or(lambda: os.listdir(sys_root / "devices/system/node"), [])
    return sum(name.startswith("node") and name[4:].isdigit() for name in names)


def _memlock() -> int:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def _gpus() -> tuple[Gpu, ...]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver too old for this torch counts as no GPU
        if not torch.cuda.is_available():
            return ()
        return tuple(_gpu(device) for device in range(torch.cuda.device_count()))


def _gpu(device: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(properties.name, total, free, f"{properties.major}.{properties.minor}")


def _cuda_build() -> str:
    import torch

    return torch.version.cuda or ""


def _versions() -> Iterator[tuple[str, str]]:
    for library in LIBRARIES:
        try:
            yield library, metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
