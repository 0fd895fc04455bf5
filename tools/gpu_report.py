"""Compile the GPU kernels as Kimi K2.5 launches them, for cards that need not be here, and say what they take.

    python tools/gpu_report.py [--arch 89 --arch 120] [--json]

The launches are recorded from the runtime's own code over tensors without memory; Triton compiles them and its
assembler counts registers, spilled bytes and shared memory of every kernel.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from hybrid.memory.kv_format import REDUCED, KVFormat
from hybrid.model.batch import Seen
from hybrid.model.gpu import Card
from hybrid.model.gpu.attention import decode
from hybrid.model.gpu.encode import encode
from hybrid.model.gpu.experts import GpuExperts, Int4Matrix, TrellisMatrix
from hybrid.model.gpu.linear import multiply
from hybrid.model.gpu.matrix import CardMatrix
from quant.trellis import layout

ARCHITECTURES = {86: "RTX 30", 89: "RTX 40", 90: "H100", 120: "RTX 50"}
HIDDEN, INTERMEDIATE, EXPERTS, TOP = 7168, 2048, 384, 8
TYPES = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
CUDA = torch.device("cuda")


class Kernel(NamedTuple):
    """One specialisation: what Triton needs to compile it."""

    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]  # arguments known to be multiples of 16
    options: dict[str, Any]

    def title(self) -> str:
        """Its name and what tells it from its siblings."""
        named = {name: value for name, value in self.constants.items() if name.isupper()}
        return f"{self.function.fn.__name__}({', '.join(f'{name}={value}' for name, value in named.items())})"


def specialise(function: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Kernel:
    """As Triton's launcher would: ones are constants, multiples of sixteen are marked."""
    names = [param.name for param in function.params]
    given = dict(zip(names, arguments, strict=False)) | {n: v for n, v in constants.items() if n in names}
    options = {name: value for name, value in constants.items() if name not in names}
    signature, fixed, divisible = {}, {}, []
    for param in function.params:
        value = given[param.name]
        if isinstance(value, torch.Tensor):
            signature[param.name] = TYPES[value.dtype]
            divisible.append(param.name)
        elif param.is_constexpr or value is None or (value == 1 and not param.do_not_specialize):
            signature[param.name], fixed[param.name] = "constexpr", value
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize:
                divisible.append(param.name)
    return Kernel(function, signature, fixed, tuple(divisible), options)


def launches() -> list[Kernel]:
    """Every specialisation that K2.5's decode and small batches start, once."""
    found: dict[str, Kernel] = {}

    def record(function: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        kernel = specialise(function, arguments, constants)
        found.setdefault(f"{kernel.title()} {kernel.signature} {kernel.options}", kernel)

    with FakeTensorMode():
        card = Card(CUDA, record)
        for experts in (trellis_layer(card), int4_layer(card)):
            step(experts, tokens=1)
        for bits, width in ((8, 1088), (4, 1152)):
            blocks = torch.empty(66, HIDDEN // (32 if bits == 8 else 64), width, dtype=torch.uint8, device=CUDA)
            for tokens in (1, 512):
                x = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device=CUDA)
                multiply(record, CardMatrix(f"int{bits}_g32", blocks, 2112, HIDDEN), x)
        for width in (1536, 8192, 18432):  # of q_b_proj, o_proj and the dense layer's down_proj
            encode(record, torch.empty(1, width, dtype=torch.bfloat16, device=CUDA))
        attend(record)
    return list(found.values())


def trellis_layer(card: Card) -> GpuExperts:
    """A layer of packed experts; which formats they have is no matter of compiling."""

    def matrix(rows: int, columns: int) -> TrellisMatrix:
        shape, planes = layout(rows, columns), torch.empty(EXPERTS, 2, 3, dtype=torch.int64, device=CUDA)
        sign, codes = torch.empty(columns, device=CUDA), torch.empty(2048, dtype=torch.int8, device=CUDA)
        return TrellisMatrix(planes, sign, columns, shape.slabs, shape.steps // 8, shape.chain, shape.tiles, codes)

    data = torch.empty(1 << 20, dtype=torch.uint8, device=CUDA)
    return GpuExperts(card, data, matrix(2 * INTERMEDIATE, HIDDEN), matrix(HIDDEN, INTERMEDIATE), sizes())


def int4_layer(card: Card) -> GpuExperts:
    starts = torch.empty(EXPERTS, dtype=torch.int64, device=CUDA)
    data = torch.empty(1 << 20, dtype=torch.uint8, device=CUDA)
    pair = Int4Matrix(starts, 2 * INTERMEDIATE, HIDDEN), Int4Matrix(starts, HIDDEN, INTERMEDIATE)
    return GpuExperts(card, data, *pair, sizes())


def sizes() -> np.ndarray:
    return np.zeros(EXPERTS, np.int64)


def step(experts: GpuExperts, tokens: int) -> None:
    x = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device=CUDA)
    ids = torch.empty(tokens, TOP, dtype=torch.int64, device=CUDA)
    experts.forward(x, ids, torch.empty(tokens, TOP, device=CUDA))


def attend(record: Any) -> None:
    """One token after 32K others, 64 heads, by every kind of cache."""
    queries = torch.empty(1, 64, 576, dtype=torch.bfloat16, device=CUDA)
    pages, one = torch.empty(1, 512, dtype=torch.int32, device=CUDA), torch.empty(1, dtype=torch.int32, device=CUDA)
    for kind in ("bf16", *REDUCED):
        format = KVFormat(kind, 512, 64)
        dtype = torch.uint8 if format.reduced else torch.bfloat16
        cache = torch.empty(32768, format.row_bytes // dtype.itemsize, dtype=dtype, device=CUDA)
        decode(record, queries, cache, Seen(pages, one, one, 32768), format, 0.1446796258)


class Figures(NamedTuple):
    kernel: str
    arch: int
    warps: int
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    seconds: float


def compile_for(kernel: Kernel, arch: int) -> Figures:
    """Machine code for one architecture, and what its assembler says of it."""
    start = time.perf_counter()
    names = [param.name for param in kernel.function.params]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in kernel.divisible}
    source = ASTSource(kernel.function, kernel.signature, kernel.constants, attributes)
    options = {"enable_fp_fusion": True} | kernel.options
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = assemble(made.asm["ptx"], arch)
    shared, warps = made.metadata.shared, made.metadata.num_warps
    return Figures(kernel.title(), arch, warps, registers, spilled, shared, time.perf_counter() - start)


def assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Registers of a thread and bytes it spills."""
    name = re.search(r"\.target (sm_\w+)", ptx)
    assert name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            get_ptxas(arch).path,
            "-v",
            f"--gpu-name={name[1]}",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, stores = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and stores, said
    return int(registers[1]), int(stores[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="What the GPU kernels take, compiled for Kimi K2.5's sizes.")
    parser.add_argument("--arch", type=int, action="append", choices=list(ARCHITECTURES), help="such as 89 for RTX 40")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kernels, architectures = launches(), options.arch or list(ARCHITECTURES)
    found = [compile_for(kernel, arch) for arch in architectures for kernel in kernels]
    if options.json:
        print(json.dumps([figures._asdict() for figures in found]))
        return
    print(f"{'kernel':100} {'arch':>5} {'warps':>6} {'registers':>10} {'spilled':>8} {'shared':>8} {'s':>6}")
    for f in found:
        print(f"{f.kernel:100} sm_{f.arch:<3}{f.warps:6} {f.registers:10} {f.spilled:8} {f.shared:8} {f.seconds:6.1f}")


if __name__ == "__main__":
    main()
