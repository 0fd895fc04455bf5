"""Routed experts on a card against their decoded weights."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hybrid.model.gpu import Card, check, experts
from hybrid.model.gpu.trellis import tables
from quant import codes
from quant.trellis import TRELLIS

NAMES = st.sampled_from(list(TRELLIS))


def test_tables_say_what_the_codes_do() -> None:
    """Any bits: the sum of two lookups is the level less the code's zero."""
    rng, found, start = np.random.default_rng(0), tables(), 0
    for code in (codes.T20, codes.T15, codes.T10):
        e = rng.integers(0, 2, 4096, np.uint8)
        o = rng.integers(0, 2, 4096 * code.odd_stream // 8, np.uint8)
        nibble, step = codes.nibble, np.arange(4096)
        if code is codes.T20:
            pairs = (nibble(e), nibble(o, 2)), (nibble(o), nibble(e, 2))
        elif code is codes.T15:
            shared = np.repeat(nibble(o), 2)
            pairs = (nibble(e), shared), (nibble(e, 3), shared)
        else:
            pairs = (nibble(e), nibble(e, 8)), (nibble(e, 4), nibble(e, 8))
        phases = len(code.a)
        first, second = (step % phases * 256 + (low | high << 4) for low, high in pairs)
        level = found[start + first] + found[start + 256 * phases + second]
        np.testing.assert_array_equal(level, codes.levels(code, e, o).astype(np.int64) - code.zero)
        start += 512 * phases
    assert start == len(found)


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.sampled_from([(64, 32), (192, 64), (96, 160), (1088, 64)]),
    st.lists(st.tuples(NAMES, NAMES), min_size=2, max_size=3),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_trellis_experts(card: Card, shape, formats, tokens, seed) -> None:
    assert check.trellis_error(card, formats, *shape, tokens, seed) < check.CLOSE


def test_several_slabs(card: Card) -> None:
    """More than 2048 rows, as both of K2.5's matrices have."""
    assert (
        check.trellis_error(card, [("trellis1_5", "trellis3"), ("trellis2_5", "trellis1")], 64, 1056, 1) < check.CLOSE
    )


def test_more_tokens_than_share_a_program(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = [("trellis2", "trellis1_5"), ("trellis1", "trellis2_5")]
    assert check.trellis_error(card, formats, 64, 32, 37) < check.CLOSE
    monkeypatch.setattr(experts, "SUMS_AT_ONCE", 4 * 64 * 2)  # four tokens at a time
    assert check.trellis_error(card, formats, 64, 32, 9) < check.CLOSE


@pytest.mark.parametrize(("hidden", "intermediate", "tokens"), [(160, 64, 3), (64, 32, 20), (96, 96, 1)])
def test_int4_experts(card: Card, hidden: int, intermediate: int, tokens: int) -> None:
    assert check.int4_error(card, hidden, intermediate, tokens) < check.CLOSE


def test_sums_may_be_shared_among_programs(card: Card) -> None:
    """Many columns and few rows: parts of a sum by programs of their own."""
    assert check.trellis_error(card, [("trellis1", "trellis1"), ("trellis3", "trellis1")], 1024, 32, 1) < check.CLOSE
    assert check.linear_error(card, "int8_g32", 33, 1024, 2) < check.CLOSE


def test_absent_experts_give_nothing(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no bytes here for expert 0, what is left is expert 1's share, whatever lies in memory."""
    layers: list[experts.GpuExperts] = []
    monkeypatch.setattr(experts.GpuExperts, "forward", spied(experts.GpuExperts.forward, layers))
    check.trellis_error(card, [("trellis2", "trellis2"), ("trellis1", "trellis1")], 64, 32, 2)
    check.int4_error(card, 64, 32, 2)
    monkeypatch.undo()
    for layer in layers:
        for matrix in (layer.gate_up, layer.down):
            if isinstance(matrix, experts.TrellisMatrix):
                matrix.planes[0] = 0
            else:
                matrix.starts[0] = -1
        x, weights = torch.randn(2, 64, device=card.device), torch.ones(2, 2, device=card.device)
        both, one = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1], [1]])
        alone = layer.forward(x, one.to(card.device), weights[:, :1])
        assert alone.abs().max() > 0
        torch.testing.assert_close(layer.forward(x, both.to(card.device), weights), alone)
        assert not layer.forward(x, 0 * one.to(card.device), weights[:, :1]).any()


def spied(forward, layers):
    def forward_and_keep(self, *arguments):
        layers.append(self)
        return forward(self, *arguments)

    return forward_and_keep
