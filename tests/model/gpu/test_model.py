"""A whole model with our GPU kernels against the same model on the CPU's."""

import dataclasses
from pathlib import Path

import pytest
import torch

from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import Settings, quantize
from hybrid.memory.kv_cache import KVCache
from hybrid.model.batch import Batch, Segment
from hybrid.model.gpu import Card
from hybrid.model.gpu.experts import int4_experts, trellis_experts
from hybrid.model.layers import CardLinear
from hybrid.model.moe import MoE
from hybrid.model.transformer import Residence, Transformer

STEPS = (  # rows of a batch by sequence: (past, tokens)
    ((0, 17),),  # more than the decode kernel takes
    ((17, 1), (0, 3)),
)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    return quantize(make_tiny(root / "source"), root / "pack", Settings(bits=2.6, seed=5, resident="int8"), threads=1)


def load(path: Path, card: Card | None) -> Transformer:
    device = torch.device("cpu") if card is None else card.device
    with open_checkpoint(path) as checkpoint:
        return Transformer(checkpoint, Residence(device, torch.bfloat16, False, 1, card=card))


def logits(model: Transformer, device: torch.device, kind: str = "bf16") -> torch.Tensor:
    """Of all steps: two sequences, prefilled and decoded together."""
    kv = KVCache(model.config, 256, dtype=torch.bfloat16, device=device, kind=kind)
    pages, found = ((2, 0), (1, 3)), []
    generator = torch.Generator().manual_seed(3)
    for step in STEPS:
        segments, start = [], 0
        for table, (past, tokens) in zip(pages, step, strict=False):
            segments.append(Segment(start, start + tokens, past, table))
            start += tokens
        ids = torch.randint(model.config.vocab_size, (start,), generator=generator)
        found.append(model.head(model.forward(Batch(ids, tuple(segments)), kv)).cpu())
    return torch.cat(found)


def with_experts_on(model: Transformer, card: Card) -> Transformer:
    """The same model whose routed experts are multiplied by the card as well."""
    for index, block in enumerate(model.blocks):
        if isinstance(block.ffn, MoE):
            host, config = block.ffn.experts, model.config
            experts = host.moe.args[0]  # type: ignore[attr-defined]
            if hasattr(experts, "data"):
                moved = trellis_experts(card, experts, host.expert_bytes)
            else:
                moved = int4_experts(card, experts, config.hidden_size, config.moe_intermediate_size)
            model.blocks[index] = dataclasses.replace(block, ffn=dataclasses.replace(block.ffn, experts=moved))
    return model


def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean KL(a || b) in nats per token."""
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_pack(pack: Path, card: Card) -> None:
    """int8 residents, trellis experts of several formats."""
    model = with_experts_on(load(pack, card), card)
    assert isinstance(model.lm_head, CardLinear) and isinstance(model.blocks[0].attention.o_proj, CardLinear)
    assert divergence(logits(load(pack, None), torch.device("cpu")), logits(model, card.device)) < 1e-2


def test_a_released_model(tiny: Path, card: Card) -> None:
    model = with_experts_on(load(tiny, card), card)
    assert divergence(logits(load(tiny, None), torch.device("cpu")), logits(model, card.device)) < 1e-2


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_reduced_cache(tiny: Path, card: Card, kind: str) -> None:
    """Both read the same bytes as the same values."""
    expected = logits(load(tiny, None), torch.device("cpu"), kind)
    assert divergence(expected, logits(load(tiny, card), card.device, kind)) < 1e-2
