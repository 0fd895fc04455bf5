"""A checkpoint run layer by layer gives what the loaded model gives, and holds one layer at a time."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid import Kimi
from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.checkpoint.tiny import make_tiny
from hybrid.errors import CheckpointError, DoesNotFit
from hybrid.model import streamed
from hybrid.model.streamed import Observer, Stream, on_cpu
from tests.checkpoint import damage

LENGTH = 300  # neither whole pages nor whole chunks
WINDOWS = [[(7 * i + 31 * w) % 320 for i in range(LENGTH)] for w in range(3)]


def run(path: Path, activations: str, windows: list[list[int]] = WINDOWS) -> Tensor:
    """fp32 [tokens, vocab], streamed."""
    with open_checkpoint(path) as checkpoint:
        stream = Stream(checkpoint, on_cpu(activations, 1), windows)
        while not stream.finished:
            stream.step()
        return stream.logits(slice(0, stream.windows.numel())).clone()


def loaded(path: Path, activations: str, windows: list[list[int]] = WINDOWS) -> Tensor:
    """The same by `Kimi`, one window after the other."""
    dtype = "float32" if activations == "float32" else "bfloat16"
    with Kimi.load(path, ctx=512, threads=1, activations=activations, dtype=dtype) as kimi:
        return torch.cat([kimi.logits(window) for window in windows])


@pytest.mark.parametrize("experts", ["int4", "bf16"])
def test_fp32_logits_are_those_of_the_loaded_model(tmp_path: Path, experts: str) -> None:
    model = make_tiny(tmp_path / "model", config={"tie_word_embeddings": experts == "bf16"}, experts=experts)
    expected, found = loaded(model, "float32"), run(model, "float32")
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_logits_are_the_same_bits_when_the_steps_are_the_same(
    tiny: Path, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = [window[:256] for window in WINDOWS]
    monkeypatch.setattr(streamed, "FED_AT_ONCE", 256)
    monkeypatch.setattr(streamed, "ROUTED_AT_ONCE", 256)
    assert torch.equal(run(tiny, activations, windows), loaded(tiny, activations, windows))


def test_windows_do_not_see_each_other(tiny: Path) -> None:
    together, alone = run(tiny, "float32"), run(tiny, "float32", WINDOWS[1:2])
    torch.testing.assert_close(together[LENGTH : 2 * LENGTH], alone)


def test_a_layer_is_let_go_before_the_next_is_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, seen = streamed.load_block, []

    def load_alone(*arguments: object) -> object:
        assert all(block() is None for block in seen)
        block = load(*arguments)
        seen.append(weakref.ref(block))
        return block

    monkeypatch.setattr(streamed, "load_block", load_alone)
    run(tiny, "int8", WINDOWS[:1])
    assert len(seen) == 3


def test_observers_see_every_token_and_every_expert_applied(tiny: Path) -> None:
    routed, applied = [], []
    observer = Observer(lambda *told: routed.append(told), lambda *told: applied.append(told))
    with open_checkpoint(tiny) as checkpoint:
        stream = Stream(checkpoint, on_cpu("float32", 1), WINDOWS)
        stream.step(observer)
        assert not routed and not applied  # a dense layer
        stream.step(observer)
        [(x, topk_ids, topk_weights)] = routed
        assert x.shape == (3 * LENGTH, 128) and topk_ids.shape == topk_weights.shape == (3 * LENGTH, 4)
        for expert, weights, inner, outputs in applied:
            rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up, down = (matrix.float() for matrix in dense(checkpoint, 1, expert))
            expected = torch.nn.functional.silu(x[rows] @ gate.T) * (x[rows] @ up.T)
            assert torch.equal(weights, topk_weights[rows, slots])
            torch.testing.assert_close(inner, expected, rtol=2e-2, atol=2e-2)  # the matrices are rounded to bf16 here
            torch.testing.assert_close(outputs, inner @ down.T, rtol=2e-2, atol=2e-2)
    assert sorted(told[0] for told in applied) == sorted(set(topk_ids.view(-1).tolist()))


def dense(checkpoint: Checkpoint, layer: int, expert: int) -> list[Tensor]:
    at = f"layers.{layer}.mlp.experts.{expert}"
    return [checkpoint.linear(f"{at}.{name}_proj") for name in ("gate", "up", "down")]


def test_a_stream_goes_on_from_where_another_was(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        first, second = (Stream(checkpoint, on_cpu("int8", 1), WINDOWS) for _ in range(2))
        first.step()
        second.resume(1, first.h.clone())
        for stream in (first, second):
            stream.step()
        assert second.done == 2 and torch.equal(first.h, second.h)


def test_values_that_are_not_numbers_are_reported_with_their_layer(tmp_path: Path, tiny: Path) -> None:
    model = damage.copy(tiny, tmp_path / "model")
    shard = model / damage.SHARD
    name = "language_model.model.layers.1.self_attn.o_proj.weight"
    damage.overwrite(shard, damage.tensor_offset(shard, name), b"\xff\x7f")
    with pytest.raises(CheckpointError, match="Layer 1 of .* not numbers"):
        run(model, "float32", WINDOWS[:1])


def test_too_little_memory_is_refused_with_numbers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "available_ram", lambda: 1 << 10)
    with pytest.raises(DoesNotFit, match="900 tokens and one layer take"):
        run(tiny, "int8")
