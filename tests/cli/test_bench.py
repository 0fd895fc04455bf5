"""`kimi-local bench` in a process of its own."""

import json
import subprocess
import sys

import pytest


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_ceiling_comes_first_and_json_last() -> None:
    done = bench("linear", "--mb", "1", "--threads", "1", "--passes", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "Physical ceiling" in lines[0] and "GB/s" in lines[1]
    found = json.loads(lines[-1])
    assert found["ceiling_gbps"]["1"] > 0
    assert {row["format"] for row in found["rows"]} == {"bf16", "int8_g32", "int4_g32"}
    assert len(lines) == 3 + len(found["rows"]) + 1  # ceiling, title, a line per row, JSON


@pytest.mark.parametrize("wrong", [["--isa", "avx9"], ["--threads", "0"], ["--batch", "one"]])
def test_a_wrong_option_is_a_line_and_exit_code_2(wrong: list[str]) -> None:
    done = bench("linear", *wrong)
    assert done.returncode == 2 and wrong[0] in done.stderr and "Traceback" not in done.stderr
