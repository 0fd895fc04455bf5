"""How many bits each expert matrix gets: the least expected error that a number of bytes can buy.

    minimise  sum over i of s_i * D(f_i)   so that  sum over i of bytes(f_i) <= budget,   i = (layer, expert, matrix)

D is the error of format f relative to the weights' own size, s_i how much an error of that size hurts. Each matrix
climbs the lower convex hull of its formats one step at a time, and every step has a price: error removed per byte.
Taking all steps of all matrices in the order of that ratio minimises the Lagrangian for every multiplier at once, so
the budget is met by cutting one sorted list; where it is cut is the multiplier.

A data-free pack knows only that early layers and down projections matter more. Routing counts and a calibration sharpen
that, shrunk towards uniform, because tomorrow's topics are not the calibration's.
"""

from typing import NamedTuple

import numpy as np

from hybrid.errors import DoesNotFit

# Mean squared error relative to the weights, measured on Gaussian matrices, which rotated ones are.
DISTORTION = {"trellis1": 0.274, "trellis1_5": 0.144, "trellis2": 0.0737, "trellis2_5": 0.0393, "trellis3": 0.0201}
# Published one-layer-at-a-time losses of this family fall from 29.6 % at the first MoE layer to 9.4 % at the last.
FIRST_LAYER, LAST_LAYER = 29.6, 9.4
MATRIX_WEIGHT = (2.0, 1.75)  # gate_up is two matrices of weight 1; an error in down hurts 1.75 times as much
# The power of use times share that an error's harm goes with. Errors do not stay where they arise: on the demo model at
# 2.0 bits, KL was 0.51 with 0 (all experts alike), 0.44 with 0.25, 0.52 with 0.5, 0.68 with 1 and the default's depth.
MODERATION = 0.25
SHRINKAGE = 1.0  # pseudo-counts per expert, in units of the mean count


class Costs(NamedTuple):
    """What the formats of the ladder cost and cause, for the two matrices of an expert."""

    bytes: np.ndarray  # int64 [2, formats]
    distortion: np.ndarray  # fp64 [formats], falling
    page: int  # an expert's bytes are rounded up to a multiple of this


def default_sensitivities(layers: int, experts: int) -> np.ndarray:
    """fp64 [layers, experts, 2] from depth and matrix type alone."""
    depth = np.geomspace(FIRST_LAYER, LAST_LAYER, layers) if layers > 1 else np.full(layers, FIRST_LAYER)
    return depth[:, None, None] * np.array(MATRIX_WEIGHT) * np.ones((1, experts, 1))


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Expected use of each expert from routing counts [layers, experts], relative to its layer's mean, shrunk."""
    mean = np.maximum(counts.mean(axis=1, keepdims=True), 1e-12)
    shrunk = counts / mean + SHRINKAGE
    return shrunk / shrunk.mean(axis=1, keepdims=True)


def calibrated_sensitivities(counts: np.ndarray, output_ms: np.ndarray, residual_ms: np.ndarray) -> np.ndarray:
    """fp64 [layers, experts, 2]: use times the share of an expert's output in the residual stream it is added to,
    both moderated. They know the depth of the model better than any default.

    counts [layers, experts]; output_ms [layers, experts], mean squares of weighted outputs; residual_ms [layers].
    """
    share = _shrunk(output_ms, counts) / np.maximum(residual_ms, 1e-30)[:, None]
    return np.array(MATRIX_WEIGHT) * ((frequencies(counts) * share) ** MODERATION)[:, :, None]


def _shrunk(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means over `counts` tokens each, drawn towards the layer's mean where tokens were few."""
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1e-12)
    layer_mean = (np.nan_to_num(values) * counts).sum(axis=1, keepdims=True) / total
    trust = counts / (counts + SHRINKAGE * np.maximum(counts.mean(axis=1, keepdims=True), 1e-12))
    return trust * np.nan_to_num(values) + (1 - trust) * layer_mean


def allocate(sensitivities: np.ndarray, costs: Costs, budget: int) -> np.ndarray:
    """int8 [layers, experts, 2]: index of each matrix's format; together at most `budget` bytes.

    Raises DoesNotFit if even the cheapest formats take more.
    """
    hulls = [_lower_hull(costs.bytes[matrix], costs.distortion) for matrix in (0, 1)]
    items, order = _steps(sensitivities, costs, hulls)

    def choice(taken: int) -> np.ndarray:
        climbed = np.bincount(items[order[:taken]], minlength=sensitivities.size).reshape(sensitivities.shape)
        return np.stack([hull[climbed[:, :, matrix]] for matrix, hull in enumerate(hulls)], axis=2).astype(np.int8)

    low, high = 0, items.size + 1  # the most steps that fit are in [low, high)
    if total_bytes(choice(0), costs) > budget:
        cheapest = total_bytes(choice(0), costs)
        raise DoesNotFit(
            f"The experts need at least {cheapest / 1e9:,.1f} GB, {max(0, budget) / 1e9:,.1f} GB are to hold them.",
            "Give them more: --ram or --bits.",
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total_bytes(choice(middle), costs) <= budget else (low, middle)
    return choice(low)


def _steps(sensitivities: np.ndarray, costs: Costs, hulls: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Every step of every matrix: the flat index of its matrix, and the order of falling error removed per byte."""
    numbers = np.arange(sensitivities.size).reshape(sensitivities.shape)
    items, prices = [], []
    for matrix, hull in enumerate(hulls):
        gain = -np.diff(costs.distortion[hull]) / np.diff(costs.bytes[matrix][hull])
        prices.append((sensitivities[:, :, matrix, None] * gain).ravel())
        items.append(np.repeat(numbers[:, :, matrix].ravel(), gain.size))
    price, item = np.concatenate(prices), np.concatenate(items)
    # Ties go to the lower (layer, expert, matrix); within one matrix prices fall strictly, so its steps stay in order.
    return item, np.lexsort((item, -price))


def _lower_hull(size: np.ndarray, distortion: np.ndarray) -> np.ndarray:
    """Indices of the formats worth using: each step to the next removes less error per byte than the one before."""
    hull: list[int] = []
    for index in np.argsort(size, kind="stable"):
        if hull and distortion[index] >= distortion[hull[-1]]:
            continue
        while hull and size[index] == size[hull[-1]]:
            hull.pop()
        while len(hull) > 1 and _price(size, distortion, hull[-1], index) >= _price(size, distortion, *hull[-2:]):
            hull.pop()
        hull.append(int(index))
    return np.array(hull)


def _price(size: np.ndarray, distortion: np.ndarray, start: int, end: int) -> float:
    return float((distortion[start] - distortion[end]) / (size[end] - size[start]))


def total_bytes(choice: np.ndarray, costs: Costs) -> int:
    """Bytes of all experts of a choice [layers, experts, 2], each rounded up to whole pages."""
    size = costs.bytes[0][choice[:, :, 0]] + costs.bytes[1][choice[:, :, 1]]
    return int((-(-size // costs.page) * costs.page).sum())


def expected_error(choice: np.ndarray, sensitivities: np.ndarray, distortion: np.ndarray) -> float:
    """What `allocate` minimises, for a given choice."""
    return float((sensitivities * distortion[choice]).sum())
