"""How far one model's answers are from another's: both streamed through the same windows, layer beside layer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybrid.checkpoint import Checkpoint
from hybrid.memory.kv_format import AUTO
from hybrid.model.streamed import Observer, Stream
from hybrid.model.transformer import Residence
from hybrid.progress import OnProgress, Progress, ignore


@dataclass(frozen=True)
class LayerComparison:
    """What a layer of A and the same layer of B made of the same text, each going on from its own state."""

    layer: int
    router_overlap: float | None  # mean share of chosen experts in common; None where experts cannot be matched
    hidden_error: float  # |b - a| / |a| of the residual stream behind the layer


@dataclass(frozen=True)
class Comparison:
    """KL(A || B) in nats per token, and what else tells two models apart; see `kimi-local compare`."""

    tokens: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    kl_stderr: float | None  # of the mean, from the spread between windows; None for a single window
    top1: float  # share of tokens after which both have the same likeliest next one
    ppl_a: float | None  # None for windows of one token
    ppl_b: float | None
    router_overlap: float | None
    layers: tuple[LayerComparison, ...]  # empty where the two are not shaped alike

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


class TokenScores(NamedTuple):
    """Figures of every token, fp32 [windows, length]; the last token of a window has no next one and surprise 0."""

    kl: Tensor
    same: Tensor
    surprise_a: Tensor  # -log p(next token), nats
    surprise_b: Tensor


def compare(
    a: Checkpoint,
    b: Checkpoint,
    windows: Sequence[Sequence[int]],
    residence: Residence,
    on_progress: OnProgress = ignore,
    *,
    kv: str = AUTO,
) -> Comparison:
    """Run both over `windows` of token ids, of one length and in a vocabulary that both share; `kv` is how B's
    rows of the KV cache are kept, and `residence` says it of A's.

    Raises CheckpointError for a model that gives values which are not numbers, DoesNotFit for too little memory.
    """
    assert a.config.vocab_size == b.config.vocab_size, "the caller refuses other pairs"
    streams = (Stream(a, residence, windows), Stream(b, replace(residence, kv=kv), windows))
    layers = _through_layers(streams, on_progress)
    return summary(score(*streams, on_progress), layers)


def _through_layers(streams: tuple[Stream, Stream], report: OnProgress) -> list[LayerComparison]:
    a, b = (stream.config for stream in streams)
    alike = (a.num_hidden_layers, a.hidden_size) == (b.num_hidden_layers, b.hidden_size)
    total = a.num_hidden_layers + b.num_hidden_layers
    layers = []
    for layer in range(max(a.num_hidden_layers, b.num_hidden_layers)):
        chosen = []
        for stream in streams:
            chosen.append(Tensor() if stream.finished else _step(stream))
            report(Progress("compare", sum(each.done for each in streams), total, "layers"))
        if alike:
            same_experts = a.n_routed_experts == b.n_routed_experts
            shared = overlap(*chosen) if same_experts and chosen[0].shape == chosen[1].shape else None
            layers.append(LayerComparison(layer, shared, relative_error(streams[0].h, streams[1].h)))
    return layers


def _step(stream: Stream) -> Tensor:
    """Take a stream through its next layer; the experts chosen, [tokens, k], empty where there are none."""
    chosen = [torch.empty(0, dtype=torch.int64)]
    stream.step(Observer(routing=lambda x, topk_ids, topk_weights: chosen.append(topk_ids.cpu())))
    return torch.cat(chosen[1:] or chosen)


def overlap(a: Tensor, b: Tensor) -> float | None:
    """Mean share of experts, [tokens, k], that two routers chose in common; None for layers without."""
    return float((a[:, :, None] == b[:, None, :]).any(-1).double().mean()) if a.numel() else None


def relative_error(a: Tensor, b: Tensor) -> float:
    """|b - a| / |a|, [tokens, hidden] each."""
    difference = scale = 0.0
    for x, y in zip(a.split(4096), b.split(4096), strict=True):
        difference += float((y.double() - x.double()).square().sum())
        scale += float(x.double().square().sum())
    return float((difference / scale) ** 0.5) if scale else 0.0


@torch.inference_mode()
def score(a: Stream, b: Stream, report: OnProgress = ignore) -> TokenScores:
    """Both heads' answers after every token, a few rows of logits at a time."""
    tokens = a.windows.numel()
    following = a.windows.roll(-1, dims=1).view(-1)
    parts = []
    for start in range(0, tokens, a.rows_at_once):
        rows = slice(start, min(start + a.rows_at_once, tokens))
        parts.append(_score_rows(a.logits(rows), b.logits(rows), following[rows]))
        report(Progress("logits", rows.stop, tokens, "tok"))
    scores = TokenScores(*(torch.cat(column).view(a.windows.shape) for column in zip(*parts, strict=True)))
    for surprise in (scores.surprise_a, scores.surprise_b):
        surprise[:, -1] = 0
    return scores


def _score_rows(a: Tensor, b: Tensor, following: Tensor) -> TokenScores:
    """Logits fp32 [rows, vocab] of both models and the next ids [rows] -> figures [rows]."""
    following = following.to(a.device)[:, None]
    same = (a.argmax(-1) == b.argmax(-1)).float()
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    surprises = [-each.gather(1, following)[:, 0] for each in (a, b)]
    kl = (b.neg_().add_(a)).mul_(a.exp()).sum(-1)
    return TokenScores(kl, same, *surprises)


def summary(scores: TokenScores, layers: Sequence[LayerComparison]) -> Comparison:
    """Figures of tokens and layers -> figures of models."""
    kl = scores.kl.double().numpy(force=True)
    windows, length = kl.shape
    overlaps = [layer.router_overlap for layer in layers if layer.router_overlap is not None]
    return Comparison(
        tokens=kl.size,
        kl_mean=float(kl.mean()),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        kl_stderr=float(kl.mean(axis=1).std(ddof=1) / windows**0.5) if windows > 1 else None,
        top1=float(scores.same.double().mean()),
        ppl_a=_perplexity(scores.surprise_a, windows * (length - 1)),
        ppl_b=_perplexity(scores.surprise_b, windows * (length - 1)),
        router_overlap=float(np.mean(overlaps)) if overlaps else None,
        layers=tuple(layers),
    )


def _perplexity(surprise: Tensor, predicted: int) -> float | None:
    return float((surprise.double().sum() / predicted).exp()) if predicted else None
