"""Every kernel compiles, at Kimi K2.5's sizes, for the cards people have; no card is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
THREADS, REGISTERS, SHARED = 1536, 65536, 101376  # of a processor; shared bytes a program may have on the smallest card


@pytest.fixture(scope="module")
def figures() -> list[dict]:
    """By a process of its own, whose Triton compiles and does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "tools/gpu_report.py", "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_every_kernel_compiles_for_every_card(figures: list[dict]) -> None:
    kernels = {found["kernel"].partition("(")[0] for found in figures}
    expected = {"encode_rows", "join_rows", "combine_rows", "multiply_trellis", "multiply_groups"}
    assert kernels == expected | {"attend_pages", "merge_parts"}
    assert {found["arch"] for found in figures} == {86, 89, 90, 120}
    assert len(figures) == 4 * len({found["kernel"] for found in figures})


def test_nothing_spills_and_all_fit(figures: list[dict]) -> None:
    for found in figures:
        assert found["spilled"] == 0, found
        assert found["shared"] <= SHARED, found
        assert 32 * found["warps"] * found["registers"] <= REGISTERS, found
