"""Every instruction set computes the same bits: the suite's kernel tests again, compiled for other CPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quant.cpu import _features, instruction_set

CPUS = {
    "avx512vnni": (  # without VBMI, as Cascade Lake
        "cascadelake",
        "+avx2,+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl,+avx512vnni,+fma,+bmi,+bmi2,+popcnt,+f16c",
    ),
    "avx2": ("haswell", "+avx2,+fma,+bmi,+bmi2,+popcnt,+f16c"),
    "avxvnni": ("haswell", "+avx2,+avx512f,+avx512vl,+avx512vnni,+fma,+bmi,+bmi2,+popcnt,+f16c"),
    "generic": ("nehalem", "+sse4.2,+popcnt"),
}

EVERY = (
    "int4_g32", "int8_g32", "linear", "activations", "swiglu", "bf16", "kv_rows", "rotation", "trellis_moe", "gemm",
    "viterbi",
)  # fmt: skip
# Compiling is what takes time. AVX-VNNI differs from AVX2 in its integer products; on old CPUs LLVM spells everything.
TESTS = {
    "avx512vnni": EVERY,
    "avx2": EVERY,
    "avxvnni": ("int4_g32", "int8_g32", "trellis_moe"),
    "generic": ("int4_g32", "int8_g32", "bf16", "kv_rows", "rotation", "trellis_moe"),
}


@pytest.mark.parametrize("isa", CPUS)
def test_kernels_are_exact(isa: str, tmp_path: Path) -> None:
    name, features = CPUS[isa]
    needed = {"avx2": "avx2", "generic": "sse4.2"}.get(isa, "avx512vnni")
    if needed not in _features():
        pytest.skip(f"this CPU has no {needed}")
    environment = os.environ | {
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": features,
        "XDG_CACHE_HOME": str(tmp_path),
        "KIMI_LOCAL_EXPECT_ISA": isa,
    }
    here = Path(__file__).parent
    tests = [str(here / f"test_{name}.py") for name in TESTS[isa]]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=here.parent.parent)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx512f", "avx512bw", "avx512vnni", "avx2"}, "avx512vnni"),
        ({"avx512f", "avx512bw", "avx2"}, "avx2"),
        ({"avx2", "avxvnni"}, "avxvnni"),
        ({"avx512f", "avx512vl", "avx512vnni", "avx2"}, "avxvnni"),
        ({"sse4.2"}, "generic"),
        (set(), "generic"),
    ],
)
def test_choice(features: set[str], expected: str) -> None:
    assert instruction_set(features) == expected
