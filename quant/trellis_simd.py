"""Eight steps of a trellis code in registers: the decoding half of the trellis kernels, emitted as LLVM vector code.

A vector holds 64 lanes, or 32, one byte each. Four bits of a lane index a table of sixteen. Under AVX-512-VBMI
(`vpermb`) an index has six bits, so a table repeated in the right order takes its four from bit 0, 1 or 2 of a byte
and ignores what stands around them: most windows of a stream need neither shift nor mask. Elsewhere each is shifted
down and masked.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quant.codes import T10, T15, T20, Code, Table
from quant.cpu import FEATURES, ISA
from quant.dots import by_parts, dot_small
from quant.simd import I8, I16, I32, at, call, constant, i32x8, operation, u8x32, u8x64

BYTES = u8x64.ir
HAS_VBMI = ISA == "avx512vnni" and "avx512vbmi" in FEATURES
SHUFFLES = {"avxvnni": "llvm.x86.avx2.pshuf.b", "avx2": "llvm.x86.avx2.pshuf.b"}


class Window(NamedTuple):
    """Four bits of every lane, from bit `place` up; what other bits hold is arbitrary under VBMI, else zero."""

    lanes: Any
    place: int


def _lookup(b: Any, table: Table, index: Window, place: int = 0) -> Any:
    """The table's entry for every lane, shifted left by `place`."""
    if HAS_VBMI:
        entries = [table[i >> index.place & 15] << place for i in range(64)]
        return call(b, "llvm.x86.avx512.permvar.qi.512", BYTES, ir.Constant(BYTES, entries), index.lanes)
    assert index.place == place == 0
    lanes = index.lanes.type
    repeated = ir.Constant(lanes, [*table] * (lanes.count // 16))
    if ISA == "avx512vnni":
        return call(b, "llvm.x86.avx512.pshuf.b.512", lanes, repeated, index.lanes)
    if ISA in SHUFFLES:
        return by_parts(b, SHUFFLES[ISA], lanes, lanes.count // 32, repeated, index.lanes)
    found = constant(lanes, table[0])  # any machine: one comparison per entry
    for value in range(1, 16):
        hit = b.icmp_unsigned("==", index.lanes, constant(lanes, value))
        found = b.select(hit, constant(lanes, table[value]), found)
    return found


def _crossed(b: Any, index: Window, table: Table, other: Window) -> Window:
    """index ^ table[other]"""
    return Window(b.xor(index.lanes, _lookup(b, table, other, index.place)), index.place)


def _shifted(b: Any, shift: Any, x: Any, count: int) -> Any:
    """Bytes shifted, with bits of the neighbouring byte coming in: no machine shifts bytes."""
    words = ir.VectorType(I16, x.type.count // 2)
    return b.bitcast(shift(b.bitcast(x, words), constant(words, count)), x.type) if count else x


def _down(b: Any, x: Any, count: int) -> Any:
    return _shifted(b, b.lshr, x, count)


def _joined(b: Any, low: Any, high: Any, count: int) -> Any:
    """The last `count` bits of the byte `low`, followed by the first of `high`."""
    kept = constant(low.type, (1 << count) - 1)
    return b.or_(b.and_(_down(b, low, 8 - count), kept), b.and_(_shifted(b, b.shl, high, count), b.not_(kept)))


def _window(b: Any, stream: tuple[Any, ...], t: int, place: int, kept: int = 3) -> Window:
    """Bits t..t+3 of consecutive bytes of a stream, at `place` if the machine may choose one.

    Taken from one byte where they lie in one, else from its last `kept` bits joined with the next byte's first; what is
    computed twice the compiler finds. Shifts are what is scarce.
    """
    place, kept = (place, kept) if HAS_VBMI else (0, 4)
    byte, offset = divmod(t, 8)
    inside, across = offset - place, offset - (8 - kept) - place
    if across >= 0 and byte + 1 < len(stream):
        lanes = _down(b, _joined(b, stream[byte], stream[byte + 1], kept), across)
    else:
        assert offset <= 4
        lanes = _down(b, stream[byte], inside)
    return Window(lanes if HAS_VBMI else b.and_(lanes, constant(lanes.type, 15)), place)


PLACES = (0, 1, 2, 0, 1, 0, 1, 2)  # by t % 8: three windows of a byte, two of it shifted by three, three across


class _Windows:
    """Windows of a stream, shifted as little as possible: made at once, or where registers are few when asked for."""

    def __init__(self, b: Any, count: int, *stream: Any) -> None:
        self.b, self.stream = b, stream
        self.made: dict[int, Window] = {}
        if stream[0].type == BYTES:
            for t in range(count):
                self[t]

    def __getitem__(self, t: int) -> Window:
        if t not in self.made:
            self.made[t] = _window(self.b, self.stream, t, PLACES[t % 8])
        return self.made[t]


def _level(b: Any, code: Code, phase: int, first: Window, second: Window) -> Any:
    return b.add(_lookup(b, code.a[phase], first), _lookup(b, code.b[phase], second))


def _t20(b: Any, e: Any, e1: Any, o: Any, o1: Any) -> Iterator[Any]:
    at_e, at_o = _Windows(b, 10, e, e1), _Windows(b, 10, o, o1)
    for t in range(8):
        first = _crossed(b, at_e[t], T20.p, at_o[t + 2])
        yield _level(b, T20, 0, first, _crossed(b, at_o[t], T20.q, at_e[t + 2]))


# Where T15's two windows of stream e stand at each step: the same for both steps that share one of stream o, so that
# they share a lookup too.
T15_FIRST, T15_SECOND = (0, 0, 2, 2, 0, 0, 2, 2), (0, 0, 1, 1, 0, 0, 1, 1)


def _t15(b: Any, e: Any, e1: Any, o: Any) -> Iterator[Any]:
    """`o` holds this block's four bits and the next block's."""
    for t in range(8):
        shared = _window(b, (o,), t // 2, PLACES[t // 2])
        first = _crossed(b, _window(b, (e, e1), t, T15_FIRST[t], 4), T15.p, shared)
        second = _crossed(b, _window(b, (e, e1), t + 3, T15_SECOND[t], 4), T15.q, shared)
        yield _level(b, T15, t % 2, first, second)


def _t10(b: Any, e: Any, e1: Any, e2: Any) -> Iterator[Any]:
    at_e = _Windows(b, 16, e, e1, e2)
    for t in range(8):
        first, second = _crossed(b, at_e[t], T10.p, at_e[t + 8]), _crossed(b, at_e[t + 4], T10.q, at_e[t + 8])
        yield _level(b, T10, 0, first, second)


def _steps(arguments: int, emit: Callable[..., Iterator[Any]]) -> Any:
    """A Numba intrinsic: lines of a stream, u8x64 or u8x32 -> the levels of eight steps, a tuple of eight such."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_tuple(builder, sig.return_type, list(emit(builder, *args)))

    def signature(line: Any) -> Any:
        return types.UniTuple(line, 8)(*[line] * arguments)

    typed = {
        3: lambda typingctx, a, b, c: (signature(a), codegen),
        4: lambda typingctx, a, b, c, d: (signature(a), codegen),
    }
    return intrinsic(typed[arguments])


levels_t20 = _steps(4, _t20)  # e, next e, o, next o
levels_t15 = _steps(3, _t15)  # e, next e, o
levels_t10 = _steps(3, _t10)  # e, next e, the one after


def _adding(arguments: int, emit: Callable[..., Iterator[Any]]) -> Any:
    """A Numba intrinsic (sums, at, x, *halves of lines): each level is multiplied as soon as it is there.

    The sums of a step, eight int32, are 64 bytes from those of the one before.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for step, level in enumerate(emit(builder, *args[3:])):
            offset = builder.add(args[1], ir.Constant(args[1].type, 64 * step))
            place = at(context, builder, sig.args[0], args[0], offset, i32x8.ir)
            builder.store(dot_small(builder, builder.load(place, align=1), level, args[2]), place, align=1)
        return context.get_dummy_value()

    def signature(sums: Any) -> Any:
        return types.void(sums, types.intp, u8x32, *[u8x32] * arguments)

    typed = {
        3: lambda typingctx, sums, at, x, a, b, c: (signature(sums), codegen),
        4: lambda typingctx, sums, at, x, a, b, c, d: (signature(sums), codegen),
    }
    return intrinsic(typed[arguments])


add_t20, add_t15, add_t10 = _adding(4, _t20), _adding(3, _t15), _adding(3, _t10)


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
        words = ir.VectorType(I16, 32)
        down = ir.Constant(words, [0] * 16 + [4] * 16)
        up = ir.Constant(words, [4] * 16 + [0] * 16)
        low = builder.lshr(builder.bitcast(builder.and_(parts[0], low_high), words), down)
        high = builder.shl(builder.bitcast(builder.and_(parts[1], low_high), words), up)
        return builder.bitcast(builder.or_(low, high), BYTES)

    return u8x64(array, types.intp, types.intp), codegen


def _half_nibbles(first: bool) -> Any:
    def emit(b: Any, line: Any, following: Any) -> Any:
        low, high = constant(line.type, 15), constant(line.type, 0xF0)
        if first:
            return b.or_(b.and_(line, low), b.and_(_shifted(b, b.shl, following, 4), high))
        return b.or_(b.and_(_down(b, line, 4), low), b.and_(following, high))

    return operation(u8x32, (u8x32, u8x32), emit)


# What `load_nibbles` gives, in two halves, of the two lines of 32 bytes.
first_nibbles, second_nibbles = _half_nibbles(True), _half_nibbles(False)
