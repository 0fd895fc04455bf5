"""The trellis codes: how a few bits per weight become one of 128 levels.

Every weight sees a window of twelve bits of its own bit streams, of which it owns one to two; its neighbours in time
see most of the same bits, so a search over whole sequences (`quant.viterbi`) finds combinations that fit all of them.
The window is turned into a level by four lookups in tables of sixteen entries, which any SIMD machine does in
registers. With nib_x(t) = x[t] + 2 x[t+1] + 4 x[t+2] + 8 x[t+3], streams e and o, indices cyclic:

    T20   2 bits    level(t) = A[nib_e(t) ^ P[nib_o(t+2)]] + B[nib_o(t) ^ Q[nib_e(t+2)]]
    T15   1.5 bits  level(t) = A[nib_e(t) ^ P[nib_o(m)]] + B[nib_e(t+3) ^ Q[nib_o(m)]]   m = t // 2, A and B by t % 2
    T10   1 bit     level(t) = A[nib_e(t) ^ P[nib_e(t+8)]] + B[nib_e(t+4) ^ Q[nib_e(t+8)]]

    weight = scale of its row * (level - zero)

The tables were trained on Gaussian values by alternating the search and least squares; relative squared error on such
values 0.0737, 0.144 and 0.274, where the bound of rate-distortion theory 2^(-2 bits) is 0.0625, 0.125 and 0.25.
"""

from typing import NamedTuple

import numpy as np

Table = tuple[int, ...]


class Code(NamedTuple):
    """One trellis code. Levels are 0..127; `unit` is the distance of two levels for values of variance one."""

    name: str
    halves: int  # half bits per weight
    zero: int
    unit: float
    a: tuple[Table, ...]  # one table, or one for even and one for odd steps
    b: tuple[Table, ...]
    p: Table
    q: Table

    @property
    def bits(self) -> float:
        return self.halves / 2

    @property
    def odd_stream(self) -> int:
        """Bits of stream o in eight steps; stream e has one per step."""
        return 4 * self.halves - 8


T20 = Code(
    "T20",
    4,
    63,
    0.0432487815848374,
    ((26, 47, 44, 32, 42, 28, 51, 21, 16, 32, 56, 37, 63, 0, 9, 16),),
    ((46, 22, 28, 0, 53, 13, 36, 16, 39, 6, 41, 64, 47, 18, 35, 26),),
    (5, 2, 3, 0, 7, 13, 12, 14, 6, 9, 4, 8, 15, 10, 1, 11),
    (12, 2, 4, 7, 15, 11, 8, 6, 5, 9, 3, 14, 0, 13, 10, 1),
)
_P = (14, 0, 12, 7, 8, 11, 3, 15, 6, 13, 5, 9, 2, 10, 1, 4)
_Q = (7, 14, 1, 9, 15, 5, 10, 13, 0, 8, 11, 12, 6, 2, 4, 3)
T15 = Code(
    "T15",
    3,
    62,
    0.0370646685427488,
    (
        (63, 18, 0, 50, 39, 35, 34, 5, 21, 53, 32, 7, 63, 28, 18, 46),
        (56, 14, 1, 45, 39, 27, 30, 0, 16, 45, 27, 0, 55, 23, 13, 42),
    ),
    (
        (9, 32, 45, 63, 34, 31, 40, 53, 50, 47, 21, 15, 21, 0, 0, 21),
        (11, 35, 50, 71, 39, 35, 44, 57, 54, 53, 27, 22, 24, 0, 8, 24),
    ),
    _P,
    _Q,
)
T10 = Code(
    "T10",
    2,
    64,
    0.0323608850211886,
    ((76, 20, 0, 59, 47, 42, 44, 6, 25, 58, 34, 6, 70, 28, 18, 54),),
    ((7, 35, 38, 50, 27, 26, 37, 51, 45, 39, 23, 13, 22, 0, 6, 17),),
    _P,
    _Q,
)
CODES = {code.name: code for code in (T10, T15, T20)}


def nibble(stream: np.ndarray, ahead: int = 0) -> np.ndarray:
    """nib_x(t + ahead) for every t: stream of bits uint8 [..., steps], cyclic, -> uint8 of the same shape."""
    bits = [np.roll(stream, -(ahead + k), axis=-1) << k for k in range(4)]
    return bits[0] | bits[1] | bits[2] | bits[3]


def levels(code: Code, e: np.ndarray, o: np.ndarray) -> np.ndarray:
    """The definition above: bits uint8 e [..., steps] and o [..., steps * odd_stream / 8] -> levels uint8 [..., steps].

    `o` is empty for T10.
    """
    a, b, p, q = (np.array(table, np.uint8) for table in (code.a, code.b, code.p, code.q))
    if code.name == "T20":
        first, second = nibble(e) ^ p[nibble(o, 2)], nibble(o) ^ q[nibble(e, 2)]
    elif code.name == "T15":
        shared = np.repeat(nibble(o), 2, axis=-1)
        first, second = nibble(e) ^ p[shared], nibble(e, 3) ^ q[shared]
    else:
        first, second = nibble(e) ^ p[nibble(e, 8)], nibble(e, 4) ^ q[nibble(e, 8)]
    phase = np.arange(e.shape[-1]) % len(code.a)
    return a[phase, first] + b[phase, second]
