"""Activations as int8: groups of 32 with one fp32 scale each, the right-hand side of every integer dot product."""

from typing import NamedTuple

import numpy as np

from quant.simd import (
    abs_f32,
    add_i32,
    horizontal_max,
    horizontal_sum,
    kernel,
    load_f32x16,
    max_f32,
    mul_f32,
    round_f32,
    splat_f32,
    splat_i32,
    store_i8x16,
    to_i32,
)

GROUP = 32
PADDING = 64  # columns are padded with zeros to whole blocks of the weight formats
LARGEST = np.float32(127.0)


class Activations(NamedTuple):
    """`values[t, k] * scales[t, k // 32]` approximates x[t, k]; `sums[t, g]` is the sum of the group's int8 values."""

    values: np.ndarray  # int8  [tokens, columns padded]
    scales: np.ndarray  # fp32  [tokens, columns padded / 32]
    sums: np.ndarray  # int32 [tokens, columns padded / 32]


class Row(NamedTuple):
    """One token's `Activations`, as the tile products take it."""

    values: np.ndarray  # int8  [columns padded]
    scales: np.ndarray  # fp32  [columns padded / 32]
    sums: np.ndarray  # int32 [columns padded / 32]


SPAN = 1024  # columns that share a scale in `Spans`; int32 sums over them are exact in fp32


class Spans(NamedTuple):
    """Rotated activations as the trellis kernels take them: one scale per span of 1024 columns.

    Rotation has spread outliers, so that smaller groups would gain nothing. `values[t, k] * scales[t, k // 1024]`
    approximates x[t, k]; `sums[t, s]` is the sum of the span's int8 values. Columns are padded with zeros to 64.
    """

    values: np.ndarray  # int8  [tokens, columns padded]
    scales: np.ndarray  # fp32  [tokens, spans]
    sums: np.ndarray  # int32 [tokens, spans]


def empty_spans(tokens: int, columns: int) -> Spans:
    """Room for `encode_spans`."""
    spans = -(-columns // SPAN)
    return Spans(
        np.zeros((tokens, -(-columns // PADDING) * PADDING), np.int8),
        np.empty((tokens, spans), np.float32),
        np.empty((tokens, spans), np.int32),
    )


def encode_spans(x: np.ndarray) -> Spans:
    """The definition, x fp32 [tokens, columns]: per span as `encode` does per group."""
    out = empty_spans(*x.shape)
    for index in range(out.scales.shape[1]):
        part = slice(index * SPAN, min((index + 1) * SPAN, x.shape[1]))
        largest = np.abs(x[:, part]).max(axis=1)
        inverse = np.divide(LARGEST, largest, out=np.zeros_like(largest), where=largest > 0)
        out.values[:, part] = np.rint(x[:, part] * inverse[:, None])
        out.scales[:, index] = largest / LARGEST
        out.sums[:, index] = out.values[:, part].sum(axis=1, dtype=np.int32)
    return out


def zeros(tokens: int, columns: int) -> Activations:
    """Activations of value zero; `columns` a multiple of 32."""
    assert columns % GROUP == 0
    groups = -(-columns // PADDING) * PADDING // GROUP
    return Activations(
        np.zeros((tokens, groups * GROUP), np.int8),
        np.zeros((tokens, groups), np.float32),
        np.zeros((tokens, groups), np.int32),
    )


def encode(x: np.ndarray) -> Activations:
    """The definition, x fp32 [tokens, columns]: scale = max|x| / 127, values = round-half-even(x * (127 / max|x|))."""
    tokens, columns = x.shape
    groups = x.reshape(tokens, columns // GROUP, GROUP)
    largest = np.abs(groups).max(axis=2)
    inverse = np.divide(LARGEST, largest, out=np.zeros_like(largest), where=largest > 0)
    values = np.rint(groups * inverse[:, :, None]).astype(np.int8)
    out = zeros(tokens, columns)
    out.values[:, :columns] = values.reshape(tokens, columns)
    out.scales[:, : columns // GROUP] = largest / LARGEST
    out.sums[:, : columns // GROUP] = values.sum(axis=2, dtype=np.int32)
    return out


@kernel
def row(x, token):
    """Row `token` of `Activations`."""
    return Row(x.values[token], x.scales[token], x.sums[token])


@kernel
def encode_group(low, high, out, group):
    """Encode one group, given as two sixteen-lane vectors, into a `Row`; equal to `encode`."""
    largest = horizontal_max(max_f32(abs_f32(low), abs_f32(high)))
    inverse = np.float32(0)
    if largest > np.float32(0):
        inverse = LARGEST / largest
    factor = splat_f32(inverse)
    first, second = to_i32(round_f32(mul_f32(low, factor))), to_i32(round_f32(mul_f32(high, factor)))
    store_i8x16(out.values, GROUP * group, first)
    store_i8x16(out.values, GROUP * group + 16, second)
    out.scales[group] = largest / LARGEST
    out.sums[group] = horizontal_sum(add_i32(first, second))


@kernel
def encode_token(x, out, token):
    """Encode row `token` of x, fp32 with any multiple of 32 columns, into the same row of `Activations`."""
    source, target = x[token], row(out, token)
    for group in range(source.size // GROUP):
        encode_group(load_f32x16(source, 128 * group), load_f32x16(source, 128 * group + 64), target, group)


@kernel
def encode_span(x, out, token, index):
    """Encode span `index` of x fp32 [columns], a multiple of 16, into row `token` of `Spans`, as `encode_spans`."""
    start, stop = 4 * SPAN * index, 4 * min(SPAN * (index + 1), x.size)
    peak = splat_f32(np.float32(0))
    for at in range(start, stop, 64):
        peak = max_f32(peak, abs_f32(load_f32x16(x, at)))
    largest = horizontal_max(peak)
    inverse = np.float32(0)
    if largest > np.float32(0):
        inverse = LARGEST / largest
    factor, total = splat_f32(inverse), splat_i32(np.int32(0))
    values = out.values[token]
    for at in range(start, stop, 64):
        rounded = to_i32(round_f32(mul_f32(load_f32x16(x, at), factor)))
        store_i8x16(values, at // 4, rounded)
        total = add_i32(total, rounded)
    out.scales[token, index] = largest / LARGEST
    out.sums[token, index] = horizontal_sum(total)
