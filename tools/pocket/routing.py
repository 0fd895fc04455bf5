"""What a trained router does: how evenly it spreads its tokens, and what it keeps apart.

A domain is a stream of tokens of one kind: the held-out text, or test cases of one skill back to back.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from math import log2
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.chat.template import ChatTemplate
from hybrid.chat.tokenizer import Tokenizer
from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.evaluation.case import prompt_ids, reply_ids
from hybrid.evaluation.skills import SKILLS, cases
from hybrid.evaluation.text import HELDOUT
from hybrid.memory.router_stats import layer_heat
from hybrid.model.streamed import Observer, Stream, on_cpu

WINDOW = 256  # tokens that see each other


def chosen(checkpoint: Checkpoint, ids: Sequence[int], threads: int = 1) -> np.ndarray:
    """The experts of every token, int16 [tokens, moe layers, k], ids being cut into windows of WINDOW tokens; what does
    not fill a window is left out."""
    count = len(ids) // WINDOW
    windows = np.asarray(ids[: count * WINDOW]).reshape(count, WINDOW).tolist()
    stream = Stream(checkpoint, on_cpu("int8", threads), windows)
    layers = []
    while not stream.finished:
        found: list[np.ndarray] = []
        stream.step(Observer(routing=lambda x, topk_ids, weights, found=found: found.append(topk_ids.numpy())))
        if found:
            layers.append(np.sort(np.concatenate(found), axis=1).astype(np.int16))
    return np.stack(layers, axis=1)


def domains(directory: Path, tokens: int, seed: int = 0) -> Iterator[tuple[str, list[int]]]:
    """Name and token ids of each domain."""
    tokenizer, template = Tokenizer.from_directory(directory), ChatTemplate.from_directory(directory)
    yield "text", tokenizer.encode(HELDOUT.read_text())[:tokens]
    for skill in SKILLS:
        said = (
            prompt_ids(case, template, tokenizer) + reply_ids(case, template, tokenizer)
            for case in cases(skill, "test", seed)
        )
        yield skill, list(islice(chain.from_iterable(said), tokens))


def counted(trace: np.ndarray, experts: int) -> np.ndarray:
    """How often `trace` [tokens, layers, k] chooses each expert: int64 [layers, experts]."""
    return np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in trace.swapaxes(0, 1)])


def shares(counts: np.ndarray) -> np.ndarray:
    """Of a layer's choices, those of each expert."""
    return counts / counts.sum(axis=1, keepdims=True)


def entropy(counts: np.ndarray) -> list[float]:
    """Of each layer, over that of equal shares: 1 is perfectly even."""
    return [round(layer_heat(layer).entropy / log2(len(layer)), 4) for layer in counts]


def busiest(counts: np.ndarray) -> list[float]:
    """The part of each layer's choices that its busiest tenth of experts gets; a tenth if all are alike."""
    return [round(layer_heat(layer).hot_share, 4) for layer in counts]


def kept(trace: np.ndarray) -> float:
    """The share of a token's experts that the token before it chose too."""
    same = (trace[1:, :, :, None] == trace[:-1, :, None, :]).any(axis=3)
    return float(same.mean())


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """How differently two domains use the experts: 0 alike, 1 none in common; mean of layers."""
    return float(np.abs(one - other).sum(axis=1).mean() / 2)


def measure(directory: Path, tokens: int = 8192, threads: int = 1) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The figures, and the traces they come from by domain."""
    with open_checkpoint(directory) as checkpoint:
        traces = {name: chosen(checkpoint, ids, threads) for name, ids in domains(directory, tokens)}
        experts = checkpoint.config.n_routed_experts
    counts = {name: counted(trace, experts) for name, trace in traces.items()}
    together = np.sum(list(counts.values()), axis=0)
    return {
        "tokens_per_domain": tokens,
        "entropy": entropy(together),
        "busiest_tenth": busiest(together),
        "domains": {
            name: {
                "entropy": entropy(counts[name]),
                "busiest_tenth": busiest(counts[name]),
                "kept": round(kept(trace), 4),
                "apart_from_text": round(apart(shares(counts[name]), shares(counts["text"])), 4),
            }
            for name, trace in traces.items()
        },
    }, traces


def save_trace(traces: dict[str, np.ndarray], path: Path, tokens: int) -> None:
    """The first tokens of every domain, one after the other: uint8 [tokens, layers, k], and where each begins."""
    each = tokens // len(traces)
    parts = [trace[:each] for trace in traces.values()]
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, chosen=np.concatenate(parts).astype(np.uint8), domains=list(traces), starts=starts)
