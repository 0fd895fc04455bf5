"""Facts about the machine: read from a made-up /proc and /sys, and found or left empty on the real one."""

import dataclasses
import json
import os
from pathlib import Path

import psutil
import pytest

from hybrid.memory import hardware
from hybrid.memory.hardware import Hardware, available_ram, disk_free, probe, total_ram

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """Roots of a made-up machine with 64 GiB, 40 GiB of it available."""
    proc, sys_root = tmp_path / "proc", tmp_path / "sys"
    write(
        proc / "meminfo", f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {40 * GIB // 1024} kB\nHugePages_Total: 0\n"
    )
    write(proc / "cpuinfo", "processor\t: 0\nmodel name\t: Ryzen 9 9950X\n\nprocessor\t: 1\nmodel name\t: Other\n")
    write(sys_root / "kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    for name in ("node0", "node1", "online", "nodes"):
        write(sys_root / "devices/system/node" / name / "x", "")
    return proc, sys_root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_facts_of_a_made_up_machine(machine: tuple[Path, Path]) -> None:
    found = probe(*machine)
    assert (found.cpu_model, found.numa_nodes) == ("Ryzen 9 9950X", 2)
    assert (found.ram_total, found.ram_available) == (64 * GIB, 40 * GIB)
    assert found.transparent_huge_pages == "madvise"


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    found = probe(tmp_path / "none", tmp_path / "none")
    assert (found.transparent_huge_pages, found.numa_nodes) == ("", 0)
    assert found.ram_available > 0  # asked of the operating system instead


def test_this_machine() -> None:
    found = probe()
    assert found.threads == len(os.sched_getaffinity(0))
    assert 0 < found.ram_available <= found.ram_total
    assert {"numpy", "torch", "numba"} <= dict(found.versions).keys()
    assert set(found.cpu_features) <= set(hardware.KERNEL_FEATURES)
    assert found.kernels in ("avx512vnni", "avxvnni", "avx2", "generic")
    json.dumps(dataclasses.asdict(found))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.threads = 1  # type: ignore[misc]


def test_page_cache_counts_as_available(machine: tuple[Path, Path]) -> None:
    assert available_ram() >= psutil.virtual_memory().free
    assert available_ram(*machine) == 40 * GIB


V2 = "0::/user.slice/job\n"
V2_FILES = ("memory.max", "memory.current", "")
V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V1 = "9:name=systemd:/\n4:memory:/docker/abc\n"


@pytest.mark.parametrize(
    ("cgroup", "directory", "names", "limit", "used", "cache", "total", "available"),
    [
        (V2, "user.slice/job", V2_FILES, 16, 10, (3, 1), 16, 10),
        (V2, "user.slice", V2_FILES, 16, 10, (3, 1), 16, 10),  # a parent's limit
        (V2, "", V2_FILES, 99, 10, (0, 0), 64, 40),  # more than there is
        (V2, "user.slice/job", V2_FILES, 16, 20, (0, 0), 16, 0),
        (V1, "memory/docker/abc", V1_FILES, 8, 6, (1, 0), 8, 3),
        (V1, "memory", V1_FILES, 8, 6, (1, 0), 8, 3),  # the group seen from inside the container
        (V1, "memory", V1_FILES, 8 << 30, 6, (1, 0), 64, 40),  # v1's way to say unlimited
    ],
)
def test_container_limits_bind(
    machine: tuple[Path, Path],
    cgroup: str,
    directory: str,
    names: tuple[str, str, str],
    limit: int,
    used: int,
    cache: tuple[int, int],
    total: int,
    available: int,
) -> None:
    """Amounts in GiB; `cache` is inactive and active file cache, which counts as available."""
    proc, sys_root = machine
    group = sys_root / "fs/cgroup" / directory
    limit_file, usage_file, prefix = names
    write(proc / "self/cgroup", cgroup)
    write(group / limit_file, f"{limit * GIB}\n")
    write(group / usage_file, f"{used * GIB}\n")
    inactive, active = (size * GIB for size in cache)
    write(group / "memory.stat", f"anon 5\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n")
    assert (total_ram(proc, sys_root), available_ram(proc, sys_root)) == (total * GIB, available * GIB)


def test_an_unlimited_container(machine: tuple[Path, Path]) -> None:
    proc, sys_root = machine
    write(proc / "self/cgroup", V2)
    write(sys_root / "fs/cgroup/user.slice/job/memory.max", "max\n")
    write(sys_root / "fs/cgroup/user.slice/job/memory.current", f"{10 * GIB}\n")
    assert available_ram(proc, sys_root) == 40 * GIB


def test_disk_free_of_a_directory_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert disk_free(tmp_path / "a" / "b") == pytest.approx(disk_free(tmp_path), rel=0.05)
    assert disk_free(tmp_path) > 0


def test_every_fact_is_optional() -> None:
    assert Hardware().gpus == () and Hardware().ram_total == 0
