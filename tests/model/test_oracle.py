"""The whole runtime against transformers' native classes: checkpoints on disk in, logits and tokens out."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid import Kimi, SamplingParams
from hybrid.config import ModelConfig
from tests.model.oracle import settled_answer, settled_tokens, transformers_logits, transformers_model
from tests.model.random_checkpoint import SEEDS, Case, make_case, random_tensors, text_of, write
from tests.reference import Reference

PROMPT, ANSWER = 16, 64
LENGTH = PROMPT + ANSWER  # past the original context of every YaRN configuration, and past a page of the cache
CHUNKS = (1, 7, 16)

# Relative error of fp32 logits. Measured at most 4e-6; 1e-3 would still be accepted as the same model.
SAME = 2e-5
# Nats per token that int8 activations may cost. A random model's experts are unrelated to each other, so every change
# of the chosen set (rounding moves scores by 1e-3) shows in full: measured up to 0.107 over all seeds. Where every
# expert is chosen only the arithmetic is left: measured up to 2.9e-3. Wrong arithmetic costs a nat or more.
KL_WITH_ROUTING = 0.2
KL_OF_ARITHMETIC = 5.5e-3
# Relative error of logits with resident weights and activations in bf16 (2^-9 per rounding): measured up to 0.043.
BF16 = 0.1


@dataclass(frozen=True)
class Trial:
    """One random checkpoint with the answers of both oracles and the runtime in full precision."""

    case: Case
    oracle: nn.Module
    prompt: list[int]
    answer: list[int]  # greedy, by transformers
    expected: Tensor  # float64 [LENGTH, vocab] by the reference, for prompt and answer
    kimi: Kimi
    logits: Tensor  # the same by the runtime, all at once

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + self.answer


@pytest.fixture(scope="module", params=SEEDS)
def trial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    seed = request.param
    case = make_case(tmp_path_factory.mktemp("checkpoint") / "model", seed)
    oracle = transformers_model(case)
    prompt, answer, expected = settled_answer(case, oracle, seed, PROMPT, ANSWER)
    with load(case) as kimi:
        yield Trial(case, oracle, prompt, answer, expected, kimi, kimi.logits(prompt + answer))


def load(case: Case, activations: str = "float32", dtype: str = "float32", **options: Any) -> Kimi:
    return Kimi.load(case.path, dtype=dtype, activations=activations, threads=1, ctx=128, **options)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL(expected || found) in nats per token; both [T, vocab] logits."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_logits_equal_transformers_and_the_reference(trial: Trial) -> None:
    assert trial.logits.dtype == torch.float32
    assert trial.logits.shape == (LENGTH, trial.case.config.vocab_size)
    assert relative_error(trial.logits, transformers_logits(trial.oracle, trial.token_ids)) < SAME
    assert relative_error(trial.logits, trial.expected) < SAME
    worst = (trial.logits - trial.expected).norm(dim=1) / trial.expected.norm(dim=1)
    assert worst.max() < 5 * SAME, f"position {int(worst.argmax())}"


def test_greedy_answers_equal_transformers(trial: Trial) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=ANSWER)
    assert list(trial.kimi.generate(trial.prompt, greedy)) == trial.answer
    # Once more, now on what the cache has kept.
    assert next(trial.kimi.generate([*trial.prompt, *trial.answer[:20]], greedy)) == trial.answer[20]


def test_prefill_in_chunks_is_prefill_at_once(trial: Trial) -> None:
    for chunk in CHUNKS:
        with load(trial.case, prefill_chunk=chunk) as kimi:
            assert relative_error(kimi.logits(trial.token_ids), trial.logits) < SAME, f"chunks of {chunk}"


def test_prefill_chooses_what_decoding_chose(trial: Trial) -> None:
    assert trial.logits[PROMPT - 1 : -1].argmax(-1).tolist() == trial.answer


def test_int8_activations_cost_little(trial: Trial) -> None:
    with load(trial.case, activations="int8") as kimi:
        logits = kimi.logits(trial.token_ids)
    if trial.case.config.quant_method == "compressed-tensors":
        assert 0 < divergence(trial.logits, logits) < KL_WITH_ROUTING
    else:  # only int4 experts are multiplied in integers
        assert torch.equal(logits, trial.logits)


@pytest.fixture(params=(4, 8, 18, 21, 22))
def unrouted(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """An int4 checkpoint whose tokens use every expert, so that rounding cannot change which."""
    raw = copy.deepcopy(make_case(tmp_path / "routed", request.param).raw)
    text = text_of(raw)
    text |= {"num_experts_per_tok": text["n_routed_experts"], "n_group": 1, "topk_group": 1}
    tensors = random_tensors(raw, request.param)
    write(tmp_path / "unrouted", raw, tensors, "language_model.model." if "text_config" in raw else "model.")
    return Case(tmp_path / "unrouted", raw, ModelConfig.from_dict(raw), tensors)


def test_int8_arithmetic(unrouted: Case) -> None:
    token_ids = settled_tokens(unrouted, 0, LENGTH)[0]
    with load(unrouted) as exact, load(unrouted, activations="int8") as kimi:
        assert 0 < divergence(exact.logits(token_ids), kimi.logits(token_ids)) < KL_OF_ARITHMETIC


def test_bf16_weights_and_activations(unrouted: Case) -> None:
    token_ids, expected = settled_tokens(unrouted, 0, LENGTH)
    with load(unrouted, activations="int8", dtype="bfloat16") as kimi:
        assert relative_error(kimi.logits(token_ids), expected) < BF16


def test_more_threads_same_logits(unrouted: Case) -> None:
    token_ids = settled_tokens(unrouted, 0, LENGTH)[0]
    with load(unrouted, activations="int8") as one:
        expected = one.logits(token_ids)
    with Kimi.load(unrouted.path, dtype="float32", threads=2, ctx=128) as two:
        assert relative_error(two.logits(token_ids), expected) < SAME


def test_the_reference_notices_positions_past_the_original_context(trial: Trial) -> None:
    """Guards the guard: had YaRN been ignored altogether, these comparisons would have failed."""
    if trial.case.config.rope_scaling is None:
        assert trial.case.config.max_position_embeddings >= LENGTH
        return
    plain = ModelConfig.from_dict(without_yarn(trial.case.raw))
    assert relative_error(Reference(plain, trial.case.tensors).logits(trial.token_ids), trial.expected) > 100 * SAME


def without_yarn(raw: dict[str, Any]) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    text = text_of(raw)
    theta = (text.pop("rope_parameters", None) or {}).get("rope_theta") or text["rope_theta"]
    text |= {"rope_scaling": None, "rope_theta": theta}
    return raw
