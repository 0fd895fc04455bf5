"""Prompts in chunks of any size, with experts that torch multiplies, always, never, or where it is measured to pay."""

from pathlib import Path

import pytest
import torch

from hybrid import Kimi
from hybrid.checkpoint import open_pack
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import Settings, quantize
from hybrid.convert.plan import INT4
from hybrid.memory import many
from hybrid.memory.slots import slot_bytes

# Every expert runs, so that no choice flips for a last bit.
CONFIG = {"n_routed_experts": 4, "num_experts_per_tok": 4, "num_hidden_layers": 3}
TOKENS = 520
BOUND = 1e-3  # mean KL in nats between two ways of computing a prompt


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("many")
    source = make_tiny(root / "source", config=CONFIG)
    packs = {"mixed": Settings(bits=2.4), "int4": Settings(mix=INT4)}
    return {"released": source} | {name: quantize(source, root / name, s, threads=1) for name, s in packs.items()}


def logits(path: Path, chunk: int, **options: object) -> torch.Tensor:
    ids = [(7 * i + i // 5) % 500 for i in range(TOKENS)]
    with Kimi.load(path, ctx=576, threads=1, dtype="float32", prefill_chunk=chunk, **options) as kimi:  # type: ignore[arg-type]
        return kimi.logits(ids)


def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean KL(a || b) in nats per token."""
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", ["released", "mixed"])
def test_prompts_in_chunks_agree(
    models: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forced, `measured` (as if torch were faster from 100 tokens on) and never, against one token at a time."""
    path, stepped = models[name], logits(models[name], 1)
    exact = logits(path, TOKENS, activations="float32")
    monkeypatch.setattr(many, "_path", lambda: tmp_path / "many-tokens.json")
    monkeypatch.setattr(many, "MATTERS", 0)
    monkeypatch.setattr(many.ManyTokens, "_measure", lambda self, formats: 100)
    for many_tokens in (1, None, many.NEVER):
        for chunk in (7, 128, 512, TOKENS):
            found = logits(path, chunk, many_tokens=many_tokens)
            by_torch = many_tokens == 1 or (many_tokens is None and chunk >= 128)
            assert divergence(stepped, found) < BOUND, (many_tokens, chunk)
            # What torch multiplies is nearer to full precision than what int8 gives.
            assert (divergence(exact, found) < 0.5 * divergence(exact, stepped)) == by_torch, (many_tokens, chunk)


def test_activations_in_full_precision_take_no_part(models: dict[str, Path]) -> None:
    whole = [logits(models["mixed"], 512, activations="float32", many_tokens=n) for n in (1, 0)]
    assert torch.equal(*whole)


@pytest.mark.parametrize("name", ["mixed", "int4"])
def test_the_drive_answers_as_ram_does(models: dict[str, Path], name: str) -> None:
    with open_pack(models[name]) as pack:
        budget = 5 * slot_bytes(pack)
    with Kimi.load(models[name], ctx=64, threads=1, ram_budget=budget) as kimi:
        assert kimi.expert_report()["tier"] is not None
    whole = logits(models[name], 128, many_tokens=100)
    assert torch.equal(logits(models[name], 128, many_tokens=100, ram_budget=budget), whole)
    assert not torch.equal(logits(models[name], 128, many_tokens=many.NEVER), whole)
