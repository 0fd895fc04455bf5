import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid.engine.sampler import LIKELY, Sampler, SamplingParams
from hybrid.errors import KimiError, UsageError

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]))


def draws(params: SamplingParams, count: int = 2000, logits: torch.Tensor = LOGITS) -> Counter[int]:
    sampler = Sampler(params)
    return Counter(sampler.sample(logits) for _ in range(count))


def test_greedy_takes_the_largest() -> None:
    assert draws(SamplingParams(temperature=0), 5) == {0: 5}


def test_frequencies_follow_the_probabilities() -> None:
    counts = draws(SamplingParams(temperature=1, top_p=1, seed=0), 20_000)
    for token, probability in enumerate(LOGITS.exp().tolist()):
        deviation = math.sqrt(20_000 * probability * (1 - probability))
        assert abs(counts[token] - 20_000 * probability) < 5 * deviation


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.95}, {0, 1, 2, 3}),
        ({"top_p": 1.0, "top_k": 2}, {0, 1}),
        ({"top_p": 1.0, "min_p": 0.29}, {0, 1, 2}),
    ],
)
def test_limits(params: dict[str, float], allowed: set[int]) -> None:
    assert set(draws(SamplingParams(temperature=1, seed=1, **params))) == allowed


def test_seed_repeats_and_other_seeds_differ() -> None:
    def sequence(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed, top_p=1))
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert sequence(7) == sequence(7)
    assert sequence(7) != sequence(8)


def test_rounding_does_not_change_what_follows() -> None:
    """With it the number of candidates changes, which must not decide how much of the generator a draw takes."""
    noise = torch.Generator().manual_seed(0)
    steps = 4 * torch.randn(200, 576, generator=noise)
    exact, rounded = Sampler(SamplingParams(seed=3, top_p=1.0)), Sampler(SamplingParams(seed=3, top_p=1.0))
    counts = []
    for logits in steps:
        other = logits + 1e-6 * torch.randn(576, generator=noise)
        counts.append([len(exact._candidates(each.softmax(0))[0]) for each in (logits, other)])
        assert exact.sample(logits) == rounded.sample(other)
    assert any(a != b for a, b in counts)


@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.sampled_from([10, LIKELY, 3 * LIKELY]))
def test_candidates_equal_a_full_sort(seed: int, top_p: float, vocab: int) -> None:
    """The shortcut over the likeliest tokens keeps exactly what sorting everything keeps."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = (torch.randn(vocab, generator=generator) * 0.1).softmax(0)
    values, ids = Sampler(SamplingParams(top_p=top_p))._candidates(probabilities)
    ordered, order = probabilities.sort(descending=True)
    kept = int(((ordered.cumsum(0) - ordered) < top_p).sum())
    assert set(ids.tolist()) == set(order[:kept].tolist())
    assert torch.equal(values, ordered[:kept])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    logits = LOGITS.clone()
    logits[3] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(KimiError, match="doctor"):
            Sampler(SamplingParams(temperature=temperature)).sample(logits)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2}, {"max_tokens": 0}]
)
def test_impossible_parameters_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)
