"""Attention of packed documents against each document alone, spelled out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pocket.attention import DocumentAttention, Layout
from torch import Tensor

HEADS, WIDTH, VALUE = 3, 8, 5


def spelled_out(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """One document and one head after the other."""
    outputs, largest = [], torch.full((HEADS,), -torch.inf)
    for qs, ks, vs in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        future = torch.ones(len(qs), len(qs), dtype=torch.bool).triu(1)
        heads = []
        for head in range(HEADS):
            scores = (qs[:, head] @ ks[:, head].T).masked_fill(future, -torch.inf)
            largest[head] = max(largest[head], scores.max().detach())
            heads.append(scores.softmax(-1) @ vs[:, head])
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs), largest


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(0, 99))
def test_every_document_alone(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = (WIDTH, WIDTH, VALUE)
    inputs = [
        torch.randn(sum(lengths), HEADS, width, generator=generator, dtype=torch.float64).requires_grad_()
        for width in widths
    ]
    out, largest = DocumentAttention.apply(*inputs, Layout.of(lengths, HEADS))
    expected, largest_expected = spelled_out(*inputs, lengths)
    assert torch.allclose(out, expected) and torch.allclose(largest, largest_expected)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(out, inputs, grad)
    for one, other in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.allclose(one, other)


def test_no_document_is_padded_by_a_step_or_more() -> None:
    layout = Layout.of([1, 32, 33, 64, 200], heads=2)
    assert [(bucket.length, len(bucket.rows)) for bucket in layout.buckets] == [
        (32, 2 * 2 * 32),
        (64, 2 * 2 * 64),
        (224, 2 * 224),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_kept(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(7, HEADS, width).to(dtype) for width in (WIDTH, WIDTH, VALUE))
    out, largest = DocumentAttention.apply(q, k, v, Layout.of([7], HEADS))
    assert out.dtype == dtype and largest.dtype == torch.float32
