"""Integer dot products of bytes, one spelling per instruction set."""

from typing import Any

from llvmlite import ir

from quant.cpu import ISA
from quant.simd import I16, I32, call, constant, i16x32, i32x8, i32x16, operation, u8x32, u8x64


def _parts(b: Any, x: Any, parts: int) -> list[Any]:
    count = x.type.count // parts
    undefined = ir.Constant(x.type, ir.Undefined)
    lanes = ir.VectorType(I32, count)
    return [
        b.shuffle_vector(x, undefined, ir.Constant(lanes, [count * part + i for i in range(count)]))
        for part in range(parts)
    ]


def _joined(b: Any, low: Any, high: Any) -> Any:
    count = low.type.count * 2
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, count), list(range(count))))


def by_parts(b: Any, name: str, result: ir.VectorType, parts: int, *args: Any) -> Any:
    """An instruction on vectors of 1 / `parts` the width (a power of two), applied to each part of the operands."""
    narrow = ir.VectorType(result.element, result.count // parts)
    found = [call(b, name, narrow, *each) for each in zip(*(_parts(b, arg, parts) for arg in args), strict=True)]
    while len(found) > 1:
        found = [_joined(b, *pair) for pair in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def _dot4_512(b: Any, acc: Any, weights: Any, x: Any) -> Any:
    return call(b, "llvm.x86.avx512.vpdpbusd.512", i32x16.ir, acc, weights, x)


def _dot4_256(b: Any, acc: Any, weights: Any, x: Any) -> Any:
    return by_parts(b, "llvm.x86.avx512.vpdpbusd.256", acc.type, acc.type.count // 8, acc, weights, x)


def _dot4_generic(b: Any, acc: Any, weights: Any, x: Any) -> Any:
    wide = ir.VectorType(I32, 64)
    products = b.mul(b.zext(weights, wide), b.sext(x, wide))
    undefined = ir.Constant(wide, ir.Undefined)
    for k in range(4):
        lanes = ir.Constant(ir.VectorType(I32, 16), [4 * i + k for i in range(16)])
        acc = b.add(acc, b.shuffle_vector(products, undefined, lanes))
    return acc


def _pairs_i8(b: Any, weights: Any, x: Any) -> Any:
    count = weights.type.count
    return by_parts(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, count // 2), count // 32, weights, x)


def _pairs_i16(b: Any, x: Any) -> Any:
    count = x.type.count
    result = ir.VectorType(I32, count // 2)
    return by_parts(b, "llvm.x86.avx2.pmadd.wd", result, count // 16, x, constant(x.type, 1))


def _dot4_avx2(b: Any, acc: Any, weights: Any, x: Any) -> Any:
    return b.add(acc, _pairs_i16(b, _pairs_i8(b, weights, x)))


DOT4 = {"avx512vnni": _dot4_512, "avxvnni": _dot4_256}
# dot4(acc, weights, x): acc[i] + sum over k of weights[4i+k] (0..255) * x[4i+k] (-128..127)
dot4 = operation(i32x16, (i32x16, u8x64, u8x64), DOT4.get(ISA, _dot4_generic))
# The same where no weight is above 127, so that two products always fit 16 bits.
dot_small = _dot4_avx2 if ISA == "avx2" else DOT4.get(ISA, _dot4_generic)
dot4_small = operation(i32x16, (i32x16, u8x64, u8x64), dot_small)
dot4_half = operation(i32x8, (i32x8, u8x32, u8x32), dot_small)  # the same of half a line, for machines of 256 bits
# The AVX2 spelling, two steps: u8 x s8 pairs added with 16-bit saturation, then 16-bit pairs added into 32 bits.
pairs_i8 = operation(i16x32, (u8x64, u8x64), _pairs_i8)
pairs_i16 = operation(i32x16, (i16x32,), _pairs_i16)


def _abs_i8(b: Any, x: Any) -> Any:
    return call(b, "llvm.abs.v64i8", u8x64.ir, x, ir.Constant(ir.IntType(1), 0))


# Signed bytes for AVX2, whose first factor has no sign: |w| times x with the sign of w; |-128| is 128, as unsigned.
flip_sign = operation(u8x64, (u8x64,), lambda b, x: b.xor(x, constant(u8x64.ir, 0x80)))  # offset by 128 to signed
abs_i8 = operation(u8x64, (u8x64,), _abs_i8)
sign_i8 = operation(u8x64, (u8x64, u8x64), lambda b, x, w: by_parts(b, "llvm.x86.avx2.psign.b", u8x64.ir, 2, x, w))
