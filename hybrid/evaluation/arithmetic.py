"""Sums, differences and products, worked out on paper: one line per column, from the ones upwards.

347+285
7+5=12
4+8+1=13
3+2+1=6
=632
"""

import random
from collections.abc import Callable

from hybrid.chat.message import Message
from hybrid.evaluation.case import Case

ASK = (
    "What is {}? Just the number.",
    "Calculate {}. Just the number.",
    "How much is {}? Answer with the number only.",
    "Work out {}, give only the number.",
    "{} = ? Only the number.",
)
SIGNS = {"+": ("+", "plus"), "-": ("-", "minus"), "*": ("*", "times")}
SPELLED = {"+": "Add {a} and {b}. Just the number.", "-": "Subtract {b} from {a}. Just the number."}


def arithmetic(rng: random.Random) -> Case:
    """Three kinds in a ratio of 9 : 8 : 3, operands of 1 to 3 digits."""
    sign = rng.choices("+-*", (9, 8, 3))[0]
    if sign == "*":
        a, b = rng.randint(2, 99), rng.randint(2, 9)
    else:
        a, b = _number(rng), _number(rng)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    result, work = METHODS[sign](a, b)
    return _case("arithmetic", rng, sign, a, b, Message("assistant", str(result), work))


def arithmetic_instant(rng: random.Random) -> Case:
    """Sums of numbers below 100, answered at once."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return _case("arithmetic_instant", rng, "+", a, b, Message("assistant", str(a + b)))


def add(a: int, b: int) -> tuple[int, str]:
    """The sum and how it is found."""
    width = len(str(max(a, b)))
    lines, carry = [f"{a:0{width}}+{b:0{width}}"], 0
    for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
        total = x + y + carry
        lines.append(f"{x}+{y}{'+1' * carry}={total}")
        carry = total // 10
    return a + b, "\n".join([*lines, f"={a + b}"])


def subtract(a: int, b: int) -> tuple[int, str]:
    """The difference, a >= b. Where a digit is too small it borrows: 2 becomes 12, and the next column pays with -1."""
    assert a >= b
    width = len(str(a))
    lines, borrowed = [f"{a:0{width}}-{b:0{width}}"], 0
    for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
        borrows = x - y - borrowed < 0
        x += 10 * borrows
        lines.append(f"{x}-{y}{'-1' * borrowed}={x - y - borrowed}")
        borrowed = int(borrows)
    return a - b, "\n".join([*lines, f"={a - b:0{width}}"])


def multiply(a: int, b: int) -> tuple[int, str]:
    """The product by one digit b, products and carries added one after the other."""
    lines, carry = [f"{a}*{b}"], 0
    for x in _digits(a, len(str(a))):
        total = x * b + carry
        lines.append(f"{x}*{b}={x * b}" + (f"+{carry}={total}" if carry else ""))
        carry = total // 10
    return a * b, "\n".join([*lines, f"={a * b}"])


METHODS: dict[str, Callable[[int, int], tuple[int, str]]] = {"+": add, "-": subtract, "*": multiply}


def _number(rng: random.Random) -> int:
    digits = rng.choices((1, 2, 3), (1, 3, 6))[0]
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _digits(number: int, width: int) -> list[int]:
    """Ones first."""
    return [int(digit) for digit in reversed(f"{number:0{width}}")]


def _case(skill: str, rng: random.Random, sign: str, a: int, b: int, answer: Message) -> Case:
    if sign in SPELLED and rng.random() < 0.15:
        question = SPELLED[sign].format(a=a, b=b)
    else:
        question = rng.choice(ASK).format(f"{a} {rng.choice(SIGNS[sign])} {b}")
    first, second = (a, b) if sign == "-" else (min(a, b), max(a, b))
    thinking = answer.reasoning_content is not None
    key = f"{first}{sign}{second}"
    return Case(skill, (Message("user", question),), (), thinking, answer, key=key)
