"""Layers of which RAM has only some experts: to the bit as if it had all, and never asked for the others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.convert import Settings, quantize
from hybrid.convert.plan import INT4
from hybrid.errors import CheckpointError
from hybrid.memory.expert_store import PackedExperts, load_experts, stored_experts

EXPERTS, LAYER = 8, 1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("store")
    made = {"mixed": Settings(bits=2.4), "int4": Settings(mix=INT4)}
    packs = {name: quantize(tiny, root / name, settings, threads=1) for name, settings in made.items()}
    return {"released": tiny, **packs}


def load(checkpoint: Checkpoint, pinned: np.ndarray | None = None) -> PackedExperts:
    experts = load_experts(checkpoint, LAYER, exact=False, dtype=torch.bfloat16, threads=1, pinned=pinned)
    assert isinstance(experts, PackedExperts)
    return experts


@pytest.mark.parametrize("name", ["mixed", "int4", "released"])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), kept=st.sets(st.integers(0, EXPERTS - 1), min_size=1))
def test_some_answer_as_they_do_among_all(models: dict[str, Path], name: str, seed: int, kept: set[int]) -> None:
    pinned = np.ones(EXPERTS, bool)
    pinned[list(kept)] = False
    rng, k = np.random.default_rng(seed), min(3, len(kept))
    x = torch.from_numpy(rng.standard_normal((4, 128), np.float32))
    ids = torch.from_numpy(np.stack([rng.permutation(sorted(kept))[:k] for _ in x]))
    weights = torch.from_numpy(rng.random((4, k), np.float32))
    with open_checkpoint(models[name], verify=True) as checkpoint:
        every, some = load(checkpoint), load(checkpoint, pinned)
    assert np.array_equal(every.expert_bytes, some.expert_bytes)
    assert torch.equal(every.forward(x, ids, weights), some.forward(x, ids, weights))


@pytest.mark.parametrize("name", ["mixed", "int4", "released"])
def test_who_is_only_on_the_card_is_not_asked_for(models: dict[str, Path], name: str) -> None:
    pinned = np.zeros(EXPERTS, bool)
    pinned[3] = True
    with open_checkpoint(models[name]) as checkpoint:
        for these in (pinned, np.ones(EXPERTS, bool)):
            with pytest.raises(AssertionError, match="only on the card"):
                load(checkpoint, these).forward(torch.zeros(1, 128), torch.tensor([[3]]), torch.ones(1, 1))


@pytest.mark.parametrize("name", ["mixed", "int4", "released"])
def test_a_stored_expert_is_the_one_in_ram(models: dict[str, Path], name: str) -> None:
    """One after the other, each into a layer that RAM has of it alone."""
    with open_checkpoint(models[name], verify=True) as checkpoint:
        stored = stored_experts(checkpoint, LAYER)
        for expert in (0, 5):
            pinned = np.arange(EXPERTS) != expert
            held = load(checkpoint, pinned).moe.args[0]  # type: ignore[attr-defined]
            alone = held.data if name == "mixed" else np.concatenate([stack.blocks.reshape(-1) for stack in held])
            found = np.concatenate(stored.read(expert))
            assert found.size == load(checkpoint).expert_bytes[expert]
            assert np.array_equal(found, alone[: found.size])


def test_a_damaged_one_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    path.mkdir()
    for file in models["mixed"].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    content = bytearray((path / "experts-00001.bin").read_bytes())
    content[70] ^= 1
    (path / "experts-00001.bin").write_bytes(content)
    with open_checkpoint(path, verify=True) as checkpoint:
        read = stored_experts(checkpoint, LAYER).read
        assert read(1)
        with pytest.raises(CheckpointError, match="layer 1 expert 0 does not have the checksum"):
            read(0)
