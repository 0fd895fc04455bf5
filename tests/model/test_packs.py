"""The runtime on packs: kernels against decoded weights, lossless packs against their source, every way of stepping."""

from pathlib import Path

import pytest
import torch

from hybrid import Kimi, SamplingParams
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import Settings, quantize
from hybrid.convert.plan import INT4
from hybrid.errors import CheckpointError

IDS = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64, 33, 83, 27, 95, 2, 88, 41, 97, 16, 93]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("packs") / "source")


@pytest.fixture(scope="module")
def pack(source: Path) -> Path:
    return quantize(source, source.parent / "mixed", Settings(bits=2.6, seed=5), threads=1)


def logits(path: Path, **options: object) -> torch.Tensor:
    with Kimi.load(path, ctx=64, threads=2, **options) as kimi:  # type: ignore[arg-type]
        return kimi.logits(IDS)


def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean KL(a || b) in nats per token."""
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_experts_of_several_formats_are_in_use(pack: Path) -> None:
    with Kimi.load(pack, ctx=64) as kimi:
        layers = kimi._checkpoint.manifest.layers.values()  # type: ignore[attr-defined]
    assert len({name for record in layers for pair in record.formats for name in pair}) > 1


def test_kernels_compute_what_the_decoded_weights_do(pack: Path) -> None:
    exact = logits(pack, dtype="float32", activations="float32")
    assert divergence(exact, logits(pack, dtype="float32")) < 2e-3
    assert divergence(exact, logits(pack)) < 1e-2


def test_int4_packs_answer_as_their_source(source: Path) -> None:
    same = quantize(source, source.parent / "int4", Settings(mix=INT4), threads=1)
    assert torch.equal(logits(same), logits(source))
    assert torch.equal(logits(same, activations="float32"), logits(source, activations="float32"))


def test_more_bits_are_closer(source: Path) -> None:
    """In both matrices of every expert, so that the order is that of the formats and not of luck."""
    exact, found = logits(source, dtype="float32"), []
    for name in ("trellis1", "trellis2", "trellis3"):
        made = quantize(source, source.parent / name, Settings(mix=(name, name)), threads=2)
        found.append(divergence(exact, logits(made, dtype="float32")))
    assert found[0] > found[1] > found[2]


def test_chunked_whole_and_one_by_one_agree(pack: Path) -> None:
    """To rounding in full precision; int8 may round an input to the other side where attention's last bits differ."""
    for activations, bound in (("float32", 1e-9), ("int8", 1e-4)):
        whole = logits(pack, dtype="float32", activations=activations)
        for chunk in (1, 5):
            stepped = logits(pack, dtype="float32", activations=activations, prefill_chunk=chunk)
            assert divergence(whole, stepped) < bound


def test_threads_do_not_change_a_bit(pack: Path) -> None:
    def greedy(threads: int) -> list[int]:
        with Kimi.load(pack, ctx=64, threads=threads) as kimi:
            return list(kimi.generate(IDS, SamplingParams(temperature=0.0, max_tokens=20)))

    assert greedy(1) == greedy(2)


def test_a_damaged_expert_never_answers_when_verification_is_on(pack: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in pack.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    file = damaged / "experts-00001.bin"
    content = bytearray(file.read_bytes())
    content[5000] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="layer 1 expert 0"):
        logits(damaged, verify=True)
    assert torch.isfinite(logits(damaged)).all(), "without it nobody would notice"
