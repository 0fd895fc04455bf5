import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid.engine.sampler import LIKELY, Sampler, SamplingParams, recommended
from hybrid.errors import KimiError, UsageError

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]))


def draws(params: SamplingParams, count: int = 2000, logits: torch.Tensor = LOGITS) -> Counter[int]:
    sampler = Sampler(params)
    return Counter(sampler.sample(logits) for _ in range(count))


@pytest.mark.parametrize(
    ("thinking", "generation", "expected"),
    [
        (True, {}, {"temperature": 1.0, "top_p": 0.95}),
        (False, {}, {"temperature": 0.6, "top_p": 0.95}),
        (False, {"temperature": 0.3, "top_k": 5, "top_p": None, "eos_token_id": 1}, {"temperature": 0.3, "top_k": 5}),
        (True, {"temperature": 0.3, "do_sample": False}, {"temperature": 0.0}),
    ],
)
def test_what_a_checkpoint_says_counts_before_what_is_recommended(
    thinking: bool, generation: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert recommended(thinking, generation, frozenset({7})) == SamplingParams(stop_ids=frozenset({7}), **expected)


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
        ({"top_p": 1e-160}, {0}),
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


def penalized(params: SamplingParams, prompt: list[int], answer: list[int], logits: torch.Tensor) -> torch.Tensor:
    """The definitions, an id at a time."""
    expected = logits.clone()
    for token in range(len(logits)):
        times = answer.count(token)
        if token in prompt + answer:
            factor = params.repetition_penalty
            expected[token] = expected[token] / factor if expected[token] > 0 else expected[token] * factor
        expected[token] -= times * params.frequency_penalty + (times > 0) * params.presence_penalty
        expected[token] += sum(bias for biased, bias in params.logit_bias if biased == token)
    return expected


IDS = st.lists(st.integers(0, 9), max_size=12)


@given(
    IDS,
    IDS,
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0.5, 2),
    st.dictionaries(st.integers(0, 9), st.floats(-9, 9)),
)
def test_penalties_are_as_defined(
    prompt: list[int], answer: list[int], presence: float, frequency: float, repetition: float, bias: dict[int, float]
) -> None:
    params = SamplingParams(
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
    )
    logits = torch.linspace(-3, 3, 10)
    sampler = Sampler(params, prompt)
    for token in answer:
        sampler.note(token)
    assert torch.allclose(sampler._adjusted(logits), penalized(params, prompt, answer, logits), atol=1e-5)
    assert torch.equal(logits, torch.linspace(-3, 3, 10)), "what was given is left as it is"


def test_only_what_is_allowed_is_drawn() -> None:
    allowed = torch.tensor([False, True, False, True, False])
    sampler = Sampler(SamplingParams(temperature=1, top_p=1, seed=0))
    assert {sampler.sample(LOGITS, allowed) for _ in range(200)} == {1, 3}
    assert Sampler(SamplingParams(temperature=0)).sample(LOGITS, allowed) == 1
    with pytest.raises(KimiError, match="allowed"):
        sampler.sample(LOGITS, torch.zeros(5, dtype=torch.bool))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"presence_penalty": 3},
        {"frequency_penalty": -3},
        {"repetition_penalty": 0},
        {"logit_bias": ((3, math.inf),)},
        {"logprobs": -1},
    ],
)
def test_impossible_parameters_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)
