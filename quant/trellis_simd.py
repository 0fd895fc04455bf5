"""Eight steps of a trellis code in registers: the decoding half of the trellis kernels, emitted as LLVM vector code.

A vector holds 64 lanes, one byte each. A window of a stream is its byte shifted right, with the next block's byte
shifted in from above; only its low four bits mean anything. Lookups therefore ignore the others where the machine has
an instruction that does (a table of 16 repeated four times under `vpermb`), and mask them elsewhere.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quant.codes import T10, T15, T20, Code, Table
from quant.cpu import FEATURES, ISA
from quant.simd import I8, I16, I32, at, by_parts, call, constant, u8x64

BYTES, WORDS = u8x64.ir, ir.VectorType(I16, 32)
HAS_VBMI = ISA == "avx512vnni" and "avx512vbmi" in FEATURES
SHUFFLES = {"avxvnni": ("llvm.x86.avx2.pshuf.b", 2), "avx2": ("llvm.x86.avx2.pshuf.b", 2)}


def _table(table: Table) -> ir.Constant:
    return ir.Constant(BYTES, [*table] * 4)


def _nibbles(b: Any, x: Any) -> Any:
    """What `_lookup` takes as indices."""
    return x if HAS_VBMI else b.and_(x, constant(BYTES, 15))


def _lookup(b: Any, table: Table, index: Any) -> Any:
    """table[index & 15] in every lane, of indices made by `_nibbles` and exclusive or."""
    if HAS_VBMI:
        return call(b, "llvm.x86.avx512.permvar.qi.512", BYTES, _table(table), index)
    if ISA == "avx512vnni":
        return call(b, "llvm.x86.avx512.pshuf.b.512", BYTES, _table(table), index)
    if ISA in SHUFFLES:
        name, parts = SHUFFLES[ISA]
        return by_parts(b, name, BYTES, parts, _table(table), index)
    found = constant(BYTES, table[0])  # any machine: one comparison per entry
    for value in range(1, 16):
        hit = b.icmp_unsigned("==", index, constant(BYTES, value))
        found = b.select(hit, constant(BYTES, table[value]), found)
    return found


def _shifted(b: Any, x: Any, count: int) -> Any:
    """Bytes shifted right, with bits of the neighbouring byte above the low four: no machine shifts bytes."""
    if count == 0:
        return x
    return b.bitcast(b.lshr(b.bitcast(x, WORDS), constant(WORDS, count)), BYTES)


def _joined(b: Any, low: Any, high: Any) -> Any:
    """The last four bits of `low` followed by the first four of `high`."""
    upper = b.bitcast(b.shl(b.bitcast(high, WORDS), constant(WORDS, 4)), BYTES)
    return b.or_(b.and_(_shifted(b, low, 4), constant(BYTES, 15)), b.and_(upper, constant(BYTES, 0xF0)))


def _windows(b: Any, *stream: Any) -> list[Any]:
    """Windows at t = 0, 1, ... of consecutive bytes of a stream, as far as four bits follow."""
    found = []
    for i, byte in enumerate(stream):
        found += [_nibbles(b, _shifted(b, byte, k)) for k in range(4)]
        if i + 1 < len(stream):
            joined = _joined(b, byte, stream[i + 1])
            found += [_nibbles(b, _shifted(b, joined, k)) for k in range(4)]
    return found


def _two(b: Any, code: Code, phase: int, first: Any, second: Any) -> Any:
    return b.add(_lookup(b, code.a[phase], first), _lookup(b, code.b[phase], second))


def _t20(b: Any, e: Any, e1: Any, o: Any, o1: Any) -> list[Any]:
    at_e, at_o = _windows(b, e, e1), _windows(b, o, o1)
    return [
        _two(
            b,
            T20,
            0,
            b.xor(at_e[t], _lookup(b, T20.p, at_o[t + 2])),
            b.xor(at_o[t], _lookup(b, T20.q, at_e[t + 2])),
        )
        for t in range(8)
    ]


def _t15(b: Any, e: Any, e1: Any, o: Any) -> list[Any]:
    """`o` holds this block's four bits and the next block's."""
    at_e = _windows(b, e, e1)
    levels = []
    for m in range(4):
        shared = _nibbles(b, _shifted(b, o, m))
        p, q = _lookup(b, T15.p, shared), _lookup(b, T15.q, shared)
        for phase in range(2):
            t = 2 * m + phase
            levels.append(_two(b, T15, phase, b.xor(at_e[t], p), b.xor(at_e[t + 3], q)))
    return levels


def _t10(b: Any, e: Any, e1: Any, e2: Any) -> list[Any]:
    at_e = _windows(b, e, e1, e2)
    levels = []
    for t in range(8):
        p, q = _lookup(b, T10.p, at_e[t + 8]), _lookup(b, T10.q, at_e[t + 8])
        levels.append(_two(b, T10, 0, b.xor(at_e[t], p), b.xor(at_e[t + 4], q)))
    return levels


def _steps(arguments: int, emit: Callable[..., list[Any]]) -> Any:
    """A Numba intrinsic: lines of a stream -> the levels of eight steps, a tuple of eight u8x64."""
    signature = types.UniTuple(u8x64, 8)(*[u8x64] * arguments)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_tuple(builder, sig.return_type, emit(builder, *args))

    typed = {
        3: lambda typingctx, a, b, c: (signature, codegen),
        4: lambda typingctx, a, b, c, d: (signature, codegen),
    }
    return intrinsic(typed[arguments])


levels_t20 = _steps(4, _t20)  # e, next e, o, next o
levels_t15 = _steps(3, _t15)  # e, next e, o
levels_t10 = _steps(3, _t10)  # e, next e, the one after


@intrinsic
def load_nibbles(typingctx, array, offset, following):
    """T15's stream o: four bits per lane from the 32 bytes at `offset`, below four from those at `following`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        half = ir.VectorType(I8, 32)
        twice = ir.Constant(ir.VectorType(I32, 64), [i % 32 for i in range(64)])
        low_high = ir.Constant(BYTES, [15] * 32 + [0xF0] * 32)
        parts = []
        for position in args[1:]:
            line = builder.load(at(context, builder, sig.args[0], args[0], position, half), align=1)
            parts.append(builder.shuffle_vector(line, ir.Constant(half, ir.Undefined), twice))
        down = ir.Constant(WORDS, [0] * 16 + [4] * 16)
        up = ir.Constant(WORDS, [4] * 16 + [0] * 16)
        low = builder.lshr(builder.bitcast(builder.and_(parts[0], low_high), WORDS), down)
        high = builder.shl(builder.bitcast(builder.and_(parts[1], low_high), WORDS), up)
        return builder.bitcast(builder.or_(low, high), BYTES)

    return u8x64(array, types.intp, types.intp), codegen
