"""The demo model itself: what it says, how near it is to its source, and that other programs read it the same way."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid import Kimi
from hybrid.chat.message import Message, Text
from hybrid.checkpoint.check import check_headers
from hybrid.checkpoint.hf import open_checkpoint
from hybrid.demo import DISK_BYTES
from hybrid.demo.convert import convert
from hybrid.demo.files import SYSTEM, text_files
from hybrid.demo.gguf_source import GGUFLlama
from hybrid.demo.llama import logits
from hybrid.demo.vocabulary import UNUSED, convert_vocabulary
from tests.model.oracle import read_case, transformers_logits, transformers_model

pytestmark = pytest.mark.demo

TEXT = """The harbour of Valletta lies on the eastern coast of Malta and has been used since at least Phoenician times.
It is a deep natural inlet with several arms, sheltered by Fort Saint Elmo on one side and Fort Ricasoli on the other.
During the Second World War the docks were bombed heavily, and much of the surrounding city had to be rebuilt.

A lens is a piece of glass or another transparent material that bends rays of light. A convex lens is thicker in the
middle and brings parallel rays together in its focus; a concave lens is thinner there and spreads them. Eyeglasses,
cameras, telescopes and microscopes all depend on lenses, usually on several of them one behind the other.

On Saturday the youngest of the three sisters packed a small suitcase, wrote a note to her mother and took the early
train to the city. She had never been further than the market town. Everything outside the window seemed enormous."""


@pytest.fixture(scope="module")
def kimi(demo: Path) -> Iterator[Kimi]:
    """In full precision."""
    with Kimi.load(demo, dtype="float32", activations="float32") as kimi:
        yield kimi


@pytest.fixture(scope="module")
def ids(kimi: Kimi) -> list[int]:
    return kimi.tokenizer.encode(TEXT)


@pytest.fixture(scope="module")
def found(kimi: Kimi, ids: list[int]) -> Tensor:
    """Logits of the demo on TEXT."""
    return kimi.logits(ids)


@pytest.fixture(scope="module")
def chatting(demo: Path) -> Iterator[Kimi]:
    """As people run it."""
    with Kimi.load(demo) as kimi:
        yield kimi


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the capital of France?", "Paris"),
        ("What is the capital of Japan?", "Tokyo"),
        ("What is the opposite of hot?", "cold"),
        ("Hello", "Hello!"),
    ],
)
def test_answers_simple_questions_and_stops(chatting: Kimi, question: str, expected: str) -> None:
    params = replace(chatting.default_params(False), temperature=0, max_tokens=60)
    reply = chatting.reply([Message("user", question)], params)
    assert expected in "".join(part.text for part in reply if isinstance(part, Text))
    assert reply.finish_reason == "stop"


def test_prompt_reads_as_the_source_was_trained(kimi: Kimi, source: GGUFLlama) -> None:
    """ChatML, id by id, behind Kimi's markers."""
    vocabulary = convert_vocabulary(source.tokens)
    prompt = kimi.template.render_ids([Message("user", "Hi")], kimi.tokenizer, thinking=kimi.default_thinking)
    assert kimi.tokenizer.decode(prompt, skip_special=False) == (
        f"<|im_system|>system<|im_middle|>{SYSTEM}<|im_end|>\n<|im_user|>user<|im_middle|>Hi<|im_end|>\n"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    spelled = "".join(source.tokens[vocabulary.read[i]] for i in prompt)
    assert spelled.replace("Ġ", " ").replace("Ċ", "\n") == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_with_a_system_message_and_thinking(kimi: Kimi) -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello."),
        Message("user", "?"),
    ]
    assert kimi.template.render(messages, thinking=True) == (
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|>\n<|im_user|>user<|im_middle|>Hi<|im_end|>\n"
        "<|im_assistant|>assistant<|im_middle|>Hello.<|im_end|>\n<|im_user|>user<|im_middle|>?<|im_end|>\n"
        "<|im_assistant|>assistant<|im_middle|><think>"
    )


def test_never_says_what_the_source_does_not_know(found: Tensor, source: GGUFLlama) -> None:
    unknown = torch.tensor(convert_vocabulary(source.tokens).said) == source.tokens.index(UNUSED)
    assert unknown.sum() > 250
    assert found.softmax(-1)[:, unknown].sum(-1).mean() < 1e-3


def test_near_the_source(found: Tensor, ids: list[int], source: GGUFLlama) -> None:
    """KL from the original: about 0.05 nats per token on prose, almost all of it from INT4."""
    vocabulary = convert_vocabulary(source.tokens)
    unknown = torch.tensor(vocabulary.said) == source.tokens.index(UNUSED)
    with torch.no_grad():
        original = logits(source, torch.tensor([[vocabulary.read[i] for i in ids]]))[0][:, vocabulary.said]
    p = original[:, ~unknown].log_softmax(-1)
    q = found[:, ~unknown].log_softmax(-1)
    assert 0.005 < (p.exp() * (p - q)).sum(-1).mean() < 0.08


def test_transformers_agrees(demo: Path, found: Tensor, ids: list[int]) -> None:
    expected = transformers_logits(transformers_model(read_case(demo)), ids[:64])
    assert (found[:64] - expected).norm() / expected.norm() < 1e-3
    assert torch.equal(found[:64].argmax(-1), expected.argmax(-1))


def test_one_expert_of_every_pair_per_token(kimi: Kimi, ids: list[int]) -> None:
    before = torch.tensor(kimi.expert_report()["counts"])
    kimi.logits(ids)
    used = torch.tensor(kimi.expert_report()["counts"]) - before
    assert used.unflatten(1, (-1, 2)).sum(-1).eq(len(ids)).all()
    shares = used[:, ::2].double().mean(0) / len(ids)
    assert shares[0] < 0.7 and shares[-1] > 0.9


def test_directory_is_as_released(demo: Path, source: GGUFLlama) -> None:
    assert check_headers(demo) == []
    assert sum(path.stat().st_size for path in demo.iterdir()) <= DISK_BYTES
    assert len(list(demo.glob("model-0000?-of-000003.safetensors"))) == 3
    assert json.loads((demo / "generation_config.json").read_text())["thinking"] is False


def test_cached_model_is_what_this_code_makes(demo: Path, source: GGUFLlama, tmp_path: Path) -> None:
    """Two layers made again. If this fails, the conversion changed and VERSION in hybrid/demo must be raised."""
    vocabulary = convert_vocabulary(source.tokens)
    for name, content in text_files(source.config, len(vocabulary.ranks), "int4").items():
        assert (demo / name).read_text(encoding="utf-8") == content, name
    few = GGUFLlama.__new__(GGUFLlama)
    vars(few).update(vars(source), config=replace(source.config, num_hidden_layers=2))
    again = convert(few, source.tokens, tmp_path / "again")
    assert (again / "tiktoken.model").read_bytes() == (demo / "tiktoken.model").read_bytes()
    with open_checkpoint(demo) as cached, open_checkpoint(again) as made:
        for name in made.names():
            # Matrix products round differently with other threads: a few codes may differ.
            one, two = cached.tensor(name), made.tensor(name)
            assert one.isclose(two, atol=1e-5).float().mean() > 0.99, name
