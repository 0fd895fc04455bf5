"""One step of the Viterbi search for 32 groups of rival states at a time, emitted as LLVM vector code."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quant.simd import I16, I32, at, call, constant, splat

STATES, LANES = 4096, 32
NUMBERS = ir.VectorType(I16, LANES)


def _cost(b: Any, x: Any, values: Any) -> Any:
    """(x - value)^2 / 2^16; both below 2^15 apart."""
    wide = ir.VectorType(I32, LANES)
    difference = b.sext(b.sub(x, values), wide)
    return b.trunc(b.lshr(b.mul(difference, difference), constant(wide, 16)), NUMBERS)


def _tournament(b: Any, rivals: list[Any]) -> tuple[Any, list[Any]]:
    """The smallest of a power of two of vectors, and for every duel, round by round, where its second won."""
    wins = []
    while len(rivals) > 1:
        duels = list(zip(rivals[::2], rivals[1::2], strict=True))
        wins += [b.icmp_unsigned("<", second, first) for first, second in duels]
        rivals = [call(b, f"llvm.umin.v{LANES}i16", NUMBERS, *duel) for duel in duels]
    return rivals[0], wins


def _step(new: int) -> Any:
    """step(metric, x, y, values, out, kept, group): a step that takes in `new` bits, for middles 32 * group on.

    metric and out uint16 [4096]; x and y int16, the numbers of this step (y only where new is 3); values int16
    [4096] for each of them; kept uint32, from whose element 2^new - 1 times group the outcome of each duel is stored.
    """
    rivals, duels = 1 << new, (1 << new) - 1

    @intrinsic
    def step(typingctx, metric, x, y, values, out, kept, group):
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            b, (metric, x, y, values, out, kept, group) = builder, args

            def place(index: int, array: Any, element: ir.Type, scale: int, offset: int) -> Any:
                where = b.add(b.mul(group, ir.Constant(group.type, scale)), ir.Constant(group.type, offset))
                return at(context, b, sig.args[index], array, where, element)

            numbers = [splat(b, scalar, NUMBERS) for scalar in ((x, y) if new == 3 else (x,))]
            apart = 2 * STATES >> new
            states = [b.load(place(0, metric, NUMBERS, 64, apart * i), align=1) for i in range(rivals)]
            best, wins = _tournament(b, states)
            for i, win in enumerate(wins):
                b.store(b.bitcast(win, I32), place(5, kept, I32, 4 * duels, 4 * i), align=1)
            for i in range(rivals):
                lanes = ir.Constant(ir.VectorType(I32, LANES), [(LANES * i + lane) >> new for lane in range(LANES)])
                total = b.shuffle_vector(best, ir.Constant(NUMBERS, ir.Undefined), lanes)
                for n, number in enumerate(numbers):
                    known = b.load(place(3, values, NUMBERS, 64 * rivals, 64 * i + 2 * STATES * n), align=1)
                    total = call(b, f"llvm.uadd.sat.v{LANES}i16", NUMBERS, total, _cost(b, number, known))
                b.store(total, place(4, out, NUMBERS, 64 * rivals, 64 * i), align=1)
            return context.get_dummy_value()

        return types.void(metric, types.int16, types.int16, values, out, kept, types.intp), codegen

    return step


step1, step2, step3 = _step(1), _step(2), _step(3)
