"""A job on a real Ray cluster of two nodes, started on this machine, whose workers are killed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hybrid.batch.cluster import spread
from hybrid.errors import MissingExtra

TOOLS, NODES = Path(__file__).parents[2] / "tools", Path(__file__).with_name("ray_nodes.py")
LINES = 150
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture
def address() -> Iterator[str]:
    """Of a cluster that lives as long as the test."""
    with subprocess.Popen([sys.executable, str(NODES)], stdin=-1, stdout=-1, stderr=-3, text=True) as nodes:
        assert nodes.stdout is not None and nodes.stdin is not None
        yield nodes.stdout.readline().strip()
        nodes.stdin.close()


def workers(address: str) -> list[psutil.Process]:
    """The processes that hold an engine of the cluster at `address`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or ()).startswith("ray::Worker") and _belongs(process, address):
            found.append(process)
    return found


def _belongs(process: psutil.Process, address: str) -> bool:
    """Workers are children of a raylet, whose command line names the address."""
    try:
        parents = [" ".join(parent.cmdline()) for parent in process.parents()]
    except psutil.NoSuchProcess:
        return False
    return any(address in line for line in parents)


@needs_ray
def test_workers_die_and_nothing_is_lost(
    tmp_path: Path, tiny: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    killer = importlib.import_module("kill_batch")
    source, calm, out = (tmp_path / f"{name}.jsonl" for name in ("in", "calm", "out"))
    killer.write_input(source, LINES)
    killer.run(killer.command(source, calm, str(tiny)))
    arguments = killer.command(source, out, str(tiny), "--ray", address)
    killed = 0
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            time.sleep(0.05)
            alive = workers(address)
            if killed < 2 and alive and killer.written(out) >= 8 * killed:
                alive[-1].kill()
                killed += 1
        assert process.stderr is not None
        err = process.stderr.read()
    assert process.returncode == 1 and "Traceback" not in err, err
    assert killed == 2
    for suffix in (".jsonl", ".errors.jsonl"):
        found = killer.essence(out.with_suffix(suffix))
        assert found == killer.essence(calm.with_suffix(suffix)) and found


@needs_ray
def test_no_cluster_and_no_model_are_one_line(tmp_path: Path, tiny: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "x", "max_tokens": 1}) + "\n")
    command = [sys.executable, "-m", "cli.main", "batch", str(source), "-o", str(tmp_path / "out.jsonl")]
    done = subprocess.run(
        [*command, "-m", str(tiny), "-q", "--ray", "127.0.0.1:1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: There is no Ray cluster at 127.0.0.1:1") and done.stderr.count("\n") == 1


def test_without_ray_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'kimi-local\[cluster\]'"):
        next(spread("auto", {}, [], 1))
