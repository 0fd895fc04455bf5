"""Sixteen-lane vectors for Numba: the words in which the kernels are written.

A kernel is plain Numba code over values of these types. Generic operations are emitted as LLVM vector code, which
LLVM splits for narrower machines (a 512-bit value is two 256-bit registers on AVX2); only `quant.dots` and
`quant.trellis_simd` name instructions. Floating-point operations are plain IEEE (no contraction, no fast
math), so every instruction set, and NumPy, computes the same bits in the same order.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, errors
from numba.extending import intrinsic, models, register_model

# For the parts of a kernel: without reference counts, whose atomic updates would drain the pipeline at every tile.
# What they return must not be an array where the caller is an ordinary `njit` function: it would count down.
kernel = njit(_nrt=False)
# For parts that pass many vectors and are called twice: as a real call those would go through memory.
inlined = njit(_nrt=False, forceinline=True)

I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


class Vector(types.Type):
    """A Numba type for an LLVM vector value; lives in registers, never in arrays."""

    def __init__(self, name: str, element: ir.Type, lanes: int) -> None:
        self.ir = ir.VectorType(element, lanes)
        super().__init__(name=name)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.ir)


u8x32 = Vector("u8x32", I8, 32)  # half of a line, and half of its products: one register where those have 256 bits
i32x8 = Vector("i32x8", I32, 8)
u8x64 = Vector("u8x64", I8, 64)
i16x16 = Vector("i16x16", I16, 16)
i16x32 = Vector("i16x32", I16, 32)
i32x16 = Vector("i32x16", I32, 16)
f32x16 = Vector("f32x16", F32, 16)

Emit = Callable[..., Any]


def constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def operation(result: types.Type, arguments: tuple[types.Type, ...], emit: Emit) -> Any:
    """A Numba intrinsic `result(*arguments)` whose code is `emit(builder, *values)`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit(builder, *args)

    signature = result(*arguments)
    typed = {
        1: lambda typingctx, a: (signature, codegen),
        2: lambda typingctx, a, b: (signature, codegen),
        3: lambda typingctx, a, b, c: (signature, codegen),
    }
    return intrinsic(typed[len(arguments)])


def at(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, element: ir.Type) -> Any:
    """Pointer to `element` at byte `offset` of a one-dimensional array's data."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(builder.bitcast(data, I8.as_pointer()), [offset]), element.as_pointer())


def splat(builder: Any, scalar: Any, vector: ir.VectorType) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    zeros = constant(ir.VectorType(I32, vector.count), 0)
    return builder.shuffle_vector(builder.insert_element(undefined, scalar, ir.Constant(I32, 0)), undefined, zeros)


def load(vector: Vector) -> Any:
    def typed(typingctx: Any, array: Any, offset: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.load(at(context, builder, sig.args[0], args[0], args[1], vector.ir), align=1)

        return vector(array, types.intp), codegen

    return intrinsic(typed)


load_u8x32 = load(u8x32)
load_i32x8 = load(i32x8)
load_u8x64 = load(u8x64)  # load_*(array, byte_offset): unaligned
load_i16x16 = load(i16x16)
load_i32x16 = load(i32x16)
load_f32x16 = load(f32x16)


def store(vector: Vector) -> Any:
    def typed(typingctx: Any, array: Any, offset: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            builder.store(args[2], at(context, builder, sig.args[0], args[0], args[1], vector.ir), align=1)
            return context.get_dummy_value()

        return types.void(array, types.intp, vector), codegen

    return intrinsic(typed)


store_f32x16 = store(f32x16)  # store_*(array, byte_offset, value): unaligned
store_i32x16 = store(i32x16)
store_u8x64 = store(u8x64)
store_u8x32 = store(u8x32)
store_i32x8 = store(i32x8)
store_i16x16 = store(i16x16)


@kernel
def store_tile(out, offset, low, high):
    """Thirty-two fp32 lanes, of two vectors, from byte `offset` on."""
    store_f32x16(out, offset, low)
    store_f32x16(out, offset + 64, high)


@intrinsic
def store_i8x16(typingctx, array, offset, value):
    """Store sixteen int32 lanes as int8 (the low byte of each)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        narrow = ir.VectorType(I8, 16)
        builder.store(
            builder.trunc(args[2], narrow), at(context, builder, sig.args[0], args[0], args[1], narrow), align=1
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, i32x16), codegen


def _bf16_bits(b: Any, x: Any) -> Any:
    """The nearest bf16 of sixteen fp32 lanes, ties to even; NaN of our making stays NaN."""
    bits = b.bitcast(x, i32x16.ir)
    odd = b.and_(b.lshr(bits, constant(i32x16.ir, 16)), constant(i32x16.ir, 1))
    rounded = b.add(b.add(bits, constant(i32x16.ir, 0x7FFF)), odd)
    return b.trunc(b.lshr(rounded, constant(i32x16.ir, 16)), i16x16.ir)


@intrinsic
def store_as(typingctx, array, index, value):
    """Store an f32x16 from element `index` on: as it is in an array of fp32, rounded to bf16 in one of uint16 bits."""
    wide = array.dtype == types.float32

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        offset = builder.mul(args[1], ir.Constant(args[1].type, 4 if wide else 2))
        stored = args[2] if wide else _bf16_bits(builder, args[2])
        builder.store(stored, at(context, builder, sig.args[0], args[0], offset, stored.type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


@intrinsic
def load_as(typingctx, array, index):
    """An f32x16 from element `index` on of an array of fp32, or of uint16 that are bits of bf16."""
    wide = array.dtype == types.float32

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        offset = builder.mul(args[1], ir.Constant(args[1].type, 4 if wide else 2))
        kind = f32x16.ir if wide else i16x16.ir
        found = builder.load(at(context, builder, sig.args[0], args[0], offset, kind), align=1)
        return found if wide else _bf16_to_f32(builder, found)

    return f32x16(array, types.intp), codegen


def _broadcast4(vector: Vector) -> Any:
    words = ir.VectorType(I32, vector.ir.count // 4)

    def typed(typingctx: Any, array: Any, offset: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            word = builder.load(at(context, builder, sig.args[0], args[0], args[1], I32), align=1)
            return builder.bitcast(splat(builder, word, words), vector.ir)

        return vector(array, types.intp), codegen

    return intrinsic(typed)


broadcast4 = _broadcast4(u8x64)  # (array, byte_offset): four adjacent bytes, over and over
broadcast4_half = _broadcast4(u8x32)


@intrinsic
def fence(typingctx):
    """No memory is kept in registers across this: what the compiler would keep there, it would spill."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        nothing = ir.FunctionType(ir.VoidType(), [])
        builder.call(ir.InlineAsm(nothing, "", "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typingctx, array, offset):
    """Ask for the cache line at byte `offset`; harmless past the end."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = at(context, builder, sig.args[0], args[0], args[1], I8)
        signature = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
        builder.call(function, [pointer, *(ir.Constant(I32, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


def call(builder: Any, name: str, result: ir.Type, *args: Any) -> Any:
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def _unary(name: str, vector: Vector) -> Any:
    return operation(vector, (vector,), lambda b, x: call(b, name, vector.ir, x))


splat_i32 = operation(i32x16, (types.int32,), lambda b, x: splat(b, x, i32x16.ir))
splat_f32 = operation(f32x16, (types.float32,), lambda b, x: splat(b, x, f32x16.ir))
add_i32 = operation(i32x16, (i32x16, i32x16), lambda b, x, y: b.add(x, y))
sub_i32 = operation(i32x16, (i32x16, i32x16), lambda b, x, y: b.sub(x, y))
eightfold = operation(i32x16, (i32x16,), lambda b, x: b.shl(x, constant(i32x16.ir, 3)))
sixteenth = operation(i32x16, (i32x16,), lambda b, x: b.ashr(x, constant(i32x16.ir, 4)))  # of a multiple of 16
xor_i32 = operation(i32x16, (i32x16, i32x16), lambda b, x, y: b.xor(x, y))
add_i16 = operation(i16x32, (i16x32, i16x32), lambda b, x, y: b.add(x, y))
add_f32 = operation(f32x16, (f32x16, f32x16), lambda b, x, y: b.fadd(x, y))
sub_f32 = operation(f32x16, (f32x16, f32x16), lambda b, x, y: b.fsub(x, y))
mul_f32 = operation(f32x16, (f32x16, f32x16), lambda b, x, y: b.fmul(x, y))
div_f32 = operation(f32x16, (f32x16, f32x16), lambda b, x, y: b.fdiv(x, y))
# a * b + c, fused where the CPU can, for sums whose exact bits nobody relies on
fma_f32 = operation(
    f32x16, (f32x16, f32x16, f32x16), lambda b, x, y, z: call(b, "llvm.fmuladd.v16f32", f32x16.ir, x, y, z)
)
min_f32 = operation(f32x16, (f32x16, f32x16), lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
# Both maxima keep NaN, so that damaged weights show in the output instead of becoming some int8 value.
max_f32 = operation(f32x16, (f32x16, f32x16), lambda b, x, y: call(b, "llvm.maximum.v16f32", f32x16.ir, x, y))
abs_f32 = _unary("llvm.fabs.v16f32", f32x16)
round_f32 = _unary("llvm.rint.v16f32", f32x16)  # half to even, as numpy.rint
to_f32 = operation(f32x16, (i32x16,), lambda b, x: b.sitofp(x, f32x16.ir))
to_i32 = operation(i32x16, (f32x16,), lambda b, x: b.fptosi(x, i32x16.ir))
horizontal_xor = operation(types.int32, (i32x16,), lambda b, x: call(b, "llvm.vector.reduce.xor.v16i32", I32, x))
horizontal_sum = operation(types.int32, (i32x16,), lambda b, x: call(b, "llvm.vector.reduce.add.v16i32", I32, x))
horizontal_max = operation(types.float32, (f32x16,), lambda b, x: call(b, "llvm.vector.reduce.fmaximum.v16f32", F32, x))


def _reduce_f32(b: Any, x: Any) -> Any:
    signature = ir.FunctionType(F32, [F32, f32x16.ir])
    function = cgutils.get_or_insert_function(b.module, signature, "llvm.vector.reduce.fadd.v16f32")
    return b.call(function, [ir.Constant(F32, -0.0), x], fastmath=("reassoc",))  # as a tree, not lane after lane


reduce_f32 = operation(types.float32, (f32x16,), _reduce_f32)


@intrinsic
def partner_f32(typingctx, x, distance):
    """A butterfly inside a vector: lanes i and i + distance become their sum and difference; distance a literal."""
    if not isinstance(distance, types.IntegerLiteral):
        raise errors.RequireLiteralValue("distance")
    step = distance.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        undefined = ir.Constant(f32x16.ir, ir.Undefined)
        places = ir.Constant(ir.VectorType(I32, 16), [i ^ step for i in range(16)])
        other = builder.shuffle_vector(args[0], undefined, places)
        total, difference = builder.fadd(args[0], other), builder.fsub(other, args[0])
        mixed = ir.Constant(ir.VectorType(I32, 16), [i + (16 if i & step else 0) for i in range(16)])
        return builder.shuffle_vector(total, difference, mixed)

    return f32x16(f32x16, distance), codegen


def _bf16_to_f32(b: Any, x: Any) -> Any:
    return b.bitcast(b.shl(b.zext(x, i32x16.ir), constant(i32x16.ir, 16)), f32x16.ir)


def _power_of_two(b: Any, n: Any) -> Any:
    return b.bitcast(b.shl(b.add(n, constant(i32x16.ir, 127)), constant(i32x16.ir, 23)), f32x16.ir)


def _byte_of(b: Any, x: Any, k: Any) -> Any:
    places = splat(b, b.shl(b.trunc(k, I32), ir.Constant(I32, 3)), i32x16.ir)
    return b.and_(b.lshr(b.bitcast(x, i32x16.ir), places), constant(i32x16.ir, 255))


def _high_nibbles_down(b: Any, x: Any) -> Any:
    words = ir.VectorType(I16, 32)  # no machine shifts bytes: shift 16-bit words and mask what leaks in
    shifted = b.lshr(b.bitcast(x, words), constant(words, 4))
    return b.and_(b.bitcast(shifted, u8x64.ir), constant(u8x64.ir, 15))


bf16_to_f32 = operation(f32x16, (i16x16,), _bf16_to_f32)
power_of_two = operation(f32x16, (i32x16,), _power_of_two)  # 2**n for -126 <= n <= 127
# One byte of every four: lane i is byte 4i + k of a u8x64.
byte_of = operation(i32x16, (u8x64, types.intp), _byte_of)
low_nibbles = operation(u8x64, (u8x64,), lambda b, x: b.and_(x, constant(u8x64.ir, 15)))
high_nibbles = operation(u8x64, (u8x64,), lambda b, x: b.and_(x, constant(u8x64.ir, 0xF0)))  # times sixteen
high_nibbles_down = operation(u8x64, (u8x64,), _high_nibbles_down)


def _atomic(emit: Emit) -> Any:
    def typed(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            offset = builder.mul(args[1], ir.Constant(args[1].type, 8))
            return emit(builder, at(context, builder, sig.args[0], args[0], offset, ir.IntType(64)), args[2])

        return types.int64(array, types.intp, types.int64), codegen

    return intrinsic(typed)


# atomic_add(counters, i, n): counters[i] += n, returning the old value; with n = 0 an ordered read.
atomic_add = _atomic(lambda b, pointer, value: b.atomic_rmw("add", pointer, value, "seq_cst"))
