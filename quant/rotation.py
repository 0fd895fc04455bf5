"""Hadamard rotation: spreads every input over a block of columns, so that weights become Gaussian whatever they were.

With H the Sylvester matrix of order `block` over sqrt(block) and D a diagonal of random signs, W x = (W D H)(H D x):
weights are rotated once, when they are quantized, activations once per token and layer. One scale per row is then
enough, outlying columns included. `block` is the largest power of two that divides the number of columns.
"""

import numpy as np
from numba import njit

from quant.simd import add_f32, kernel, load_f32x16, mul_f32, partner_f32, splat_f32, store_f32x16, sub_f32

MATRICES = ("gate_up", "down")


def block_size(columns: int) -> int:
    """Columns that are rotated together: 1024 for K2.5's gate and up, 2048 for its down."""
    return columns & -columns


def signs(seed: int, layer: int, matrix: str, columns: int) -> np.ndarray:
    """int8 [columns] of +1 and -1: the lowest bit of SplitMix64 at a place given by all the arguments."""
    origin = (seed << 40) + (layer << 24) + (MATRICES.index(matrix) << 23)
    with np.errstate(over="ignore"):
        z = (np.arange(1, columns + 1, dtype=np.uint64) + np.uint64(origin)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return 1 - 2 * (z & np.uint64(1)).astype(np.int8)


def hadamard(x: np.ndarray) -> np.ndarray:
    """H applied to the last axis of x, fp32, block by block: butterflies from neighbours up, then one scaling."""
    block = block_size(x.shape[-1])
    y = np.array(x, np.float32).reshape(-1, block)
    stride = 1
    while stride < block:
        pairs = y.reshape(len(y), -1, 2, stride)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        y = np.stack((low + high, low - high), axis=2).reshape(len(y), block)
        stride *= 2
    return (y * np.float32(block**-0.5)).reshape(x.shape)


def rotate(x: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """H D on the last axis, fp32: activations [.., columns], and the rows of a weight matrix alike."""
    return hadamard(x.astype(np.float32) * sign)


def rotate_back(x: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """The inverse of `rotate`."""
    return hadamard(x) * sign


def rotate_rows(x: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """`rotate` of a matrix fp32 [rows, columns] by the kernel below; the same bits, many times faster."""
    out = np.empty(x.shape, np.float32)
    _rotate_rows(np.ascontiguousarray(x, np.float32), sign.astype(np.float32), out)
    return out


# --- in the kernels --------------------------------------------------------------------------------------------------


@kernel
def rotate_row(x, sign, out, block):
    """`rotate` of one row, the same bits: x, sign (+-1) and out fp32 [columns], `block` a multiple of 32."""
    scale = splat_f32(np.float32(1.0) / np.float32(np.sqrt(np.float32(block))))
    for at in range(0, 4 * x.size, 64):
        store_f32x16(out, at, _within(mul_f32(load_f32x16(x, at), load_f32x16(sign, at))))
    for start in range(0, 4 * x.size, 4 * block):
        stride = 64
        while stride < 4 * block:
            for pair in range(start, start + 4 * block, 2 * stride):
                for at in range(pair, pair + stride, 64):
                    low, high = load_f32x16(out, at), load_f32x16(out, at + stride)
                    store_f32x16(out, at, add_f32(low, high))
                    store_f32x16(out, at + stride, sub_f32(low, high))
            stride *= 2
    for at in range(0, 4 * x.size, 64):
        store_f32x16(out, at, mul_f32(load_f32x16(out, at), scale))


@njit(cache=True, nogil=True)
def _rotate_rows(x, sign, out):
    for row in range(x.shape[0]):
        rotate_row(x[row], sign, out[row], x.shape[1] & -x.shape[1])


@kernel
def _within(v):
    """The four stages inside a vector."""
    v = partner_f32(v, 1)
    v = partner_f32(v, 2)
    v = partner_f32(v, 4)
    return partner_f32(v, 8)
