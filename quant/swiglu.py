"""SwiGLU, silu(gate) * up, from basic IEEE operations only, so that NumPy and every kernel agree to the last bit."""

import numpy as np

from quant.simd import (
    add_f32,
    div_f32,
    kernel,
    max_f32,
    min_f32,
    mul_f32,
    power_of_two,
    round_f32,
    splat_f32,
    sub_f32,
    to_i32,
)

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # ln 2, the first part exact in 10 bits
LIMIT = np.float32(87.0)  # exp stays a normal number on [-87, 87]
# exp(r) on |r| <= ln2 / 2: Taylor coefficients 1/7! .. 1/2!, largest relative error 6e-9
TAYLOR = tuple(np.float32(1 / k) for k in (5040, 720, 120, 24, 6, 2))
ONE = np.float32(1)


def exp(x: np.ndarray) -> np.ndarray:
    """exp(x), fp32, for x clipped to [-87, 87]: 2^n * e^r with n = round(x / ln 2)."""
    x = np.clip(x, -LIMIT, LIMIT)
    n = np.rint(x * LOG2_E)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = np.full_like(r, TAYLOR[0])
    for coefficient in (*TAYLOR[1:], ONE, ONE):
        p = p * r + coefficient
    return p * ((n.astype(np.int32) + 127) << 23).view(np.float32)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gate / (1 + exp(-gate)) * up, fp32, any shape."""
    return gate / (ONE + exp(-gate)) * up


@kernel
def _step(p, r, coefficient):
    return add_f32(mul_f32(p, r), splat_f32(coefficient))


@kernel
def exp_lanes(x):
    """`exp` of a f32x16."""
    x = max_f32(min_f32(x, splat_f32(LIMIT)), splat_f32(-LIMIT))
    n = round_f32(mul_f32(x, splat_f32(LOG2_E)))
    r = sub_f32(sub_f32(x, mul_f32(n, splat_f32(LN2_HIGH))), mul_f32(n, splat_f32(LN2_LOW)))
    p = _step(splat_f32(TAYLOR[0]), r, TAYLOR[1])
    p = _step(_step(_step(_step(p, r, TAYLOR[2]), r, TAYLOR[3]), r, TAYLOR[4]), r, TAYLOR[5])
    return mul_f32(_step(_step(p, r, ONE), r, ONE), power_of_two(to_i32(n)))


@kernel
def swiglu_lanes(gate, up):
    """`swiglu` of two f32x16."""
    minus = sub_f32(splat_f32(np.float32(0)), gate)
    return mul_f32(div_f32(gate, add_f32(splat_f32(ONE), exp_lanes(minus))), up)
