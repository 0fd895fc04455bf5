"""An exported model through the runtime: the trainer's own logits, and weights to the last bit."""

from pathlib import Path

import pytest
import torch
from pocket.config import TEXT_CONFIG, model_config, released_config
from pocket.export import export, matrices
from pocket.model import Forward, Tokens, shapes
from pocket.qat import is_expert, kept_bits, multiplied
from pocket.state import State
from pocket.train import Trainer

from hybrid import Kimi
from hybrid.chat.tokenizer import NUM_SPECIALS, write_tokenizer
from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.expected import expected_tensors
from hybrid.checkpoint.tiny import tiny_ranks
from hybrid.config import ModelConfig
from hybrid.errors import KimiError
from tests.tools.pocket_copy import TINY, Copy, settings


@pytest.fixture(scope="module")
def trained() -> State:
    """A few large steps from the start, with a router bias that matters."""
    threads = torch.get_num_threads()
    state = State.new(settings(9).config, 0)
    with Trainer(settings(9, lr=0.02, gamma=0.02, freeze_from=9), state, Copy()) as trainer:
        for _ in range(6):
            trainer.step()
    torch.set_num_threads(threads)
    return state


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_tokenizer(directory, tiny_ranks(TINY["vocab_size"] - NUM_SPECIALS))
    return directory


@pytest.mark.parametrize("experts", ["int4", "int2", "bf16"])
def test_the_runtime_computes_the_trainers_logits(trained: State, data: Path, tmp_path: Path, experts: str) -> None:
    plan = settings(9)
    model = export(plan, trained, data, tmp_path / "model", experts=experts)
    ids = torch.randint(TINY["vocab_size"], (50,), generator=torch.Generator().manual_seed(1))
    weights = multiplied(trained.masters, torch.float32, bits=kept_bits(experts))
    expected = Forward(plan.config, weights, trained.bias).logits(ids)
    with Kimi.load(model, dtype="float32", activations="float32", ctx=64, threads=1) as kimi:
        found = kimi.logits(ids.tolist())
        assert kimi.tokenizer.vocab_size == TINY["vocab_size"]
    assert (found - expected).abs().max() < 1e-4 and expected.std() > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_experts_are_those_multiplied(trained: State, data: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = export(settings(9), trained, data, tmp_path / "model")
    multiplied_now = multiplied(trained.masters, dtype, bits=4)
    with open_checkpoint(model) as checkpoint:
        for name in filter(is_expert, trained.masters):
            for linear, weight in matrices(name, multiplied_now[name]):
                assert torch.equal(checkpoint.linear(linear, dtype), weight), linear


def test_an_unknown_kind_of_experts_is_refused(trained: State, data: Path, tmp_path: Path) -> None:
    with pytest.raises(KimiError, match="int5"):
        export(settings(9), trained, data, tmp_path / "model", experts="int5")
    assert not (tmp_path / "model").exists()


def test_packed_documents_do_not_see_each_other(trained: State) -> None:
    config = settings(9).config
    batch = Copy().batch(3, 2, 64)
    tokens = Tokens.of(*batch, config.num_attention_heads)
    forward = Forward(config, multiplied(trained.masters, torch.float32, bits=None), trained.bias)
    together = torch.nn.functional.linear(forward.hidden(tokens)[0], forward.weights["lm_head.weight"])
    starts = [*(tokens.positions == 0).nonzero().flatten().tolist(), len(tokens.ids)]
    for start, end in zip(starts, starts[1:], strict=False):
        assert torch.allclose(together[start:end], forward.logits(tokens.ids[start:end]), atol=1e-4)


def test_losses_are_where_the_weights_say() -> None:
    batch = Copy().batch(3, 2, 64)
    tokens = Tokens.of(*batch, 4)
    assert len(tokens.targets) == int((batch.weights > 0).sum())
    assert torch.equal(tokens.ids[tokens.before + 1], tokens.targets)


def test_the_pocket_model_is_whole() -> None:
    """Names, sizes and the size on disk that was promised."""
    facts, config = ModelConfig.from_dict(released_config()), model_config()
    assert facts == config and config.quant_method == "compressed-tensors"
    names = {name for name in shapes(config) if not is_expert(name)}
    expected = {name for name in expected_tensors(config) if ".experts." not in name and "correction_bias" not in name}
    assert names == expected
    assert sum(torch.Size(shape).numel() for shape in shapes(config).values()) == pytest.approx(20.1e6, rel=0.01)
    assert config.routed_params * 4.5 / 8 + 2 * config.resident_params < 30e6
    assert TEXT_CONFIG["vocab_size"] == 4096


def test_without_a_tokenizer_it_says_how_to_make_one(trained: State, tmp_path: Path) -> None:
    with pytest.raises(KimiError, match="holds no tokenizer"):
        export(settings(9), trained, tmp_path, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
