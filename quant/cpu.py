"""Which instruction set the kernels are compiled for.

Follows Numba's own choice, so `NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma` forces the AVX2 kernels on any
machine, and the dispatch here can never disagree with the code generator.
"""

import llvmlite.binding as llvm
from numba.core import config


def _features() -> set[str]:
    if config.CPU_FEATURES is not None:
        return {feature[1:] for feature in config.CPU_FEATURES.split(",") if feature.startswith("+")}
    return {name for name, present in llvm.get_host_cpu_features().items() if present}


def instruction_set(features: set[str]) -> str:
    """The best kernel family for a set of LLVM feature names: avx512vnni, avxvnni, avx2 or generic."""
    if {"avx512f", "avx512bw", "avx512vnni"} <= features:
        return "avx512vnni"
    if "avxvnni" in features or {"avx512vl", "avx512vnni"} <= features:
        return "avxvnni"
    return "avx2" if "avx2" in features else "generic"


FEATURES = _features()
MULTIPLIES_BF16 = bool({"avx512bf16", "amx-bf16"} & FEATURES)  # elsewhere a library's bf16 takes many times fp32's time
ISA = instruction_set(FEATURES)
CPU_NAME = config.CPU_NAME or llvm.get_host_cpu_name()
