"""From a matrix to its bits: rotation, trellis search panel by panel, feedback of what each panel got wrong.

With a Hessian H of the inputs (the mean of x x^T) the aim is the smallest error of the outputs, trace(E H E^T), and a
panel's error is made good by the columns still to come, as GPTQ and LDLQ do it: with H = R R^T, R upper triangular,
and U = R^-1, the columns after a panel p lose E_p U_pp^-1 U_p,after. Without one every panel stands for itself.
"""

from typing import NamedTuple

import numpy as np

from quant.activations import GROUP
from quant.codes import Code
from quant.rotation import rotate_rows
from quant.scales import to_bits
from quant.trellis import COLUMNS, Layout, Plane, layout, matrix_bytes, pack, plane_scales, planes
from quant.viterbi import search, search_of, streams

DAMPING = 0.01  # of the mean diagonal of H
ENOUGH = 256  # rows that tell a weighted error well; all of them would cost as much as the search
BLOCK = 128  # columns whose errors reach the rest of the matrix in one product
EXPECTED = {2: 0.279, 3: 0.144, 4: 0.074}  # error of a plane, by half bits: what the next plane will find


class Encoded(NamedTuple):
    """A matrix as bytes, and what was lost."""

    blob: np.ndarray  # uint8 [matrix_bytes]
    error: float  # trace(E H E^T) / trace(W H W^T) over some rows, H the identity where none was given
    plain_error: float  # |E|^2 / |W|^2


class Inputs(NamedTuple):
    """What the inputs of a matrix tell the encoder; the same for all matrices of one shape that share them."""

    hessian: np.ndarray  # fp32 [columns, columns], rotated
    feedback: np.ndarray  # fp32 [columns padded, columns padded], see `feedback`


def inputs(hessian: np.ndarray, sign: np.ndarray, rows: int) -> Inputs:
    """From the mean of x x^T, fp32 [columns, columns], unrotated, for matrices of `rows` rows. K2.5: some 20 s."""
    shape = layout(rows, len(hessian))
    rotated = rotate_rows(rotate_rows(hessian, sign).T, sign)
    return Inputs(rotated, feedback(rotated, shape.tiles * COLUMNS, 4 * shape.chain))


def encode(weights: np.ndarray, name: str, sign: np.ndarray, known: Inputs | None = None) -> Encoded:
    """weights fp32 [rows, columns] in trellis format `name`; sign int8 [columns], see `quant.rotation.signs`.

    Deterministic, on one thread.
    """
    rows, columns = weights.shape
    assert rows % 16 == 0 and columns % GROUP == 0, weights.shape
    shape = layout(rows, columns)
    turned = np.zeros((shape.tiles * COLUMNS, shape.padded_rows), np.float32)  # columns first: a panel is contiguous
    turned[:columns, :rows] = rotate_rows(weights, sign).T
    rotated = None if known is None else known.hessian
    whole = _energy(turned[:columns, :rows], rotated)
    blob = np.zeros(matrix_bytes(name, rows, columns), np.uint8)
    parts = planes(name, blob, shape)
    found = _search_all(turned.copy(), parts, _start_scales(turned, parts, columns), shape, known)
    for plane, scale in zip(parts, _refit(turned, found), strict=True):
        plane.scales[:] = to_bits(scale)
    for plane, levels in zip(parts, found, strict=True):
        turned -= levels * plane_scales(plane)
    lost = _energy(turned[:columns, :rows], rotated)
    weighted, plain = (float(a / b) if b > 0 else 0.0 for a, b in zip(lost, whole, strict=True))
    return Encoded(blob, weighted, plain)


def feedback(hessian: np.ndarray, padded: int, group: int) -> np.ndarray:
    """fp32 [padded, padded]: row block p holds U_pp^-1 U_p of the damped Hessian, for groups of `group` columns."""
    columns = len(hessian)
    full = np.zeros((padded, padded))
    mean = float(np.trace(hessian)) / columns or 1.0
    full[:columns, :columns] = hessian
    full[np.arange(padded), np.arange(padded)] += DAMPING * mean + np.where(np.arange(padded) < columns, 0.0, mean)
    upper = np.linalg.cholesky(full[::-1, ::-1])[::-1, ::-1]  # R
    inverse = np.linalg.inv(upper)
    for start in range(0, padded, group):
        part = slice(start, start + group)
        inverse[part, start:] = np.linalg.solve(inverse[part, part], inverse[part, start:])
    return np.triu(inverse).astype(np.float32)


def _start_scales(turned: np.ndarray, parts: list[Plane], columns: int) -> list[np.ndarray]:
    """fp32 [padded rows] for each plane, before any level is known: the spread of what the plane will code."""
    spread = np.sqrt(np.square(turned).sum(axis=0) / np.float32(columns))
    scales = []
    for plane in parts:
        scales.append(spread)
        spread = spread * np.float32(EXPECTED[plane.code.halves] ** 0.5)
    return scales


def _search_all(
    turned: np.ndarray, parts: list[Plane], scales: list[np.ndarray], shape: Layout, known: Inputs | None
) -> list[np.ndarray]:
    """Find the bits of all planes, group of columns after group; consumes `turned` [columns, rows].

    Returns each plane's levels less zero, int8 [columns, rows].
    """
    group = 4 * shape.chain
    kept = [np.empty((len(turned) // group, shape.slabs, 64, _windows(shape, p.code)), np.uint16) for p in parts]
    found = [np.empty(turned.shape, np.int8) for _ in parts]
    errors = np.empty((BLOCK, turned.shape[1]), np.float32)
    for start in range(0, len(turned), group):
        part = turned[start : start + group]
        rest = part.copy()
        for plane, scale, states, levels in zip(parts, scales, kept, found, strict=True):
            states[start // group] = _search_group(rest, plane.code, scale, shape)
            levels[start : start + group] = _levels(states[start // group], plane.code, shape)
            rest -= levels[start : start + group] * (scale * np.float32(plane.code.unit))
        if known is None:
            continue
        fed = known.feedback
        block = start // BLOCK * BLOCK
        end = min(block + BLOCK, len(turned))
        errors[start - block : start - block + group] = rest
        turned[start + group : end] -= fed[start : start + group, start + group : end].T @ rest
        if start + group == end:
            turned[end:] -= fed[block:end, end:].T @ errors[: end - block]
    for plane, states in zip(parts, kept, strict=True):
        _store(states, plane, shape)
    return found


def _windows(shape: Layout, code: Code) -> int:
    return shape.chain * shape.steps // len(search_of(code).values)


def _search_group(part: np.ndarray, code: Code, scale: np.ndarray, shape: Layout) -> np.ndarray:
    """Windows uint16 [slabs, 64, windows] of one chain, part fp32 [4 * chain columns, padded rows]."""
    safe = np.where(scale > 0, scale, np.float32(1))
    numbers = (part / safe).reshape(shape.chain, 4, shape.slabs, shape.steps, 16).transpose(2, 4, 1, 0, 3)
    return search(code, numbers.reshape(shape.slabs * 64, -1)).reshape(shape.slabs, 64, -1)


def _levels(states: np.ndarray, code: Code, shape: Layout) -> np.ndarray:
    """Levels less zero of windows, int8 [4 * chain columns, padded rows]."""
    found = np.stack([table[states] for table in search_of(code).levels], axis=-1)
    split = found.reshape(shape.slabs, 16, 4, shape.chain, shape.steps).transpose(3, 2, 0, 4, 1)
    return split.reshape(4 * shape.chain, shape.padded_rows)


def _store(states: np.ndarray, plane: Plane, shape: Layout) -> None:
    """Pack windows uint16 [groups, slabs, 64, windows] into the plane."""
    ordered = states.reshape(shape.tiles, -1, *states.shape[1:]).transpose(2, 0, 1, 3, 4)
    pack(*streams(plane.code, ordered), plane, shape)


def _refit(turned: np.ndarray, found: list[np.ndarray]) -> list[np.ndarray]:
    """Least-squares row scales for the levels found, all planes together, fp32 [padded rows] each."""
    gram = np.zeros((turned.shape[1], len(found), len(found)))
    wanted = np.zeros((turned.shape[1], len(found)))
    for start in range(0, len(turned), BLOCK):
        parts = [levels[start : start + BLOCK].astype(np.float32) for levels in found]
        for i, part in enumerate(parts):
            wanted[:, i] += np.einsum("cr,cr->r", part, turned[start : start + BLOCK])
            for j, other in enumerate(parts):
                gram[:, i, j] += np.einsum("cr,cr->r", part, other)
    gram += np.eye(len(found)) * 1e-9
    return list(np.linalg.solve(gram, wanted[..., None])[..., 0].T.astype(np.float32))


def _energy(turned: np.ndarray, hessian: np.ndarray | None) -> tuple[float, float]:
    """trace(A H A^T), over evenly chosen rows where there are many, and |A|^2 of a matrix given by its columns."""
    plain = float(np.vdot(turned, turned))
    if hessian is None:
        return plain, plain
    some = np.ascontiguousarray(turned[:, :: max(1, turned.shape[1] // ENOUGH)])
    return float(np.vdot(hessian @ some, some)), plain
