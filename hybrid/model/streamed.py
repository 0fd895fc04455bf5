"""Windows of text through a checkpoint one layer at a time, so that a model larger than memory can still be judged.

A layer's weights are read once, every token passes, and they are let go. Attention sees one window after the other,
over a cache that holds one window of one layer; then the experts take many tokens at once, because reading one is worth
more the more tokens share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hybrid.checkpoint import Checkpoint
from hybrid.errors import CheckpointError, DoesNotFit
from hybrid.memory import expert_store
from hybrid.memory.expert_store import ExactExperts, ObserveExpert
from hybrid.memory.hardware import available_ram
from hybrid.memory.kv_cache import KVCache
from hybrid.memory.router_stats import RouterStats
from hybrid.model import moe
from hybrid.model.batch import Batch, Segment
from hybrid.model.layers import Linear, Weights, rms_norm
from hybrid.model.moe import MoE, ObserveRouting
from hybrid.model.rope import Rope
from hybrid.model.transformer import Block, Residence, load_block

ATTENDED_AT_ONCE = 256  # tokens of a window, as the engine prefills them
FED_AT_ONCE = 2048  # tokens in the feed-forward part
ROUTED_AT_ONCE = 1 << 16  # tokens for exact experts, which are decoded anew every time
LOGITS_AT_ONCE = 1 << 25  # values, 128 MiB of fp32
GIB = 1 << 30


@dataclass(frozen=True)
class Observer:
    """Who is told what happens in a layer of experts, a few thousand tokens at a time.

    `routing` gets the MoE's normed input [tokens, hidden], topk_ids and topk_weights [tokens, k]; `expert`, only where
    experts are exact, an expert's number, its tokens' weights [n], inner activations [n, intermediate] (the input of
    down) and outputs fp32 [n, hidden].
    """

    routing: ObserveRouting = moe.unobserved
    expert: ObserveExpert = expert_store.unobserved


NOBODY = Observer()


def on_cpu(activations: str, threads: int) -> Residence:
    """How a checkpoint is run: "int8" as `Kimi` does by default, "float32" everything in fp32."""
    exact = activations == "float32"
    return Residence(torch.device("cpu"), torch.float32 if exact else torch.bfloat16, exact, threads)


class Stream:
    """The residual stream of all windows between two layers; `step` takes it through the next one."""

    def __init__(self, checkpoint: Checkpoint, residence: Residence, windows: Sequence[Sequence[int]]) -> None:
        """`windows` are token ids, independent sequences of one length.

        Raises DoesNotFit, before weights are read, when memory will not hold the widest layer beside the stream.
        """
        self.checkpoint, self.residence, self.config = checkpoint, residence, checkpoint.config
        self.windows = torch.tensor(windows, dtype=torch.int64)
        self.done = 0
        _require_memory(checkpoint, residence, self.windows.numel())
        table = checkpoint.tensor("embed_tokens.weight")
        self.h = table[self.windows.view(-1)].to(residence.device, residence.dtype)  # [tokens, hidden]
        self.rope = Rope(self.config, residence.device)

    @property
    def finished(self) -> bool:
        return self.done == self.config.num_hidden_layers

    def resume(self, done: int, h: Tensor) -> None:
        """Go on behind layer `done` - 1 with the residual stream [tokens, hidden] that an earlier run left there."""
        assert h.shape == self.h.shape, (h.shape, self.h.shape)
        self.done, self.h = done, h.to(self.residence.device, self.residence.dtype)

    @torch.inference_mode()
    def step(self, observer: Observer = NOBODY) -> None:
        """Take all windows through the next layer. Raises CheckpointError if what comes out is not numbers."""
        assert not self.finished, "there is no further layer"
        block = self._load(observer)
        self._attend(block)
        self._feed(block)
        if not bool(torch.isfinite(self.h).all()):
            raise self._damaged(f"Layer {self.done}")
        self.done += 1

    @property
    def rows_at_once(self) -> int:
        """Rows of logits that stay within the memory meant for them."""
        return max(1, LOGITS_AT_ONCE // self.config.vocab_size)

    @torch.inference_mode()
    def logits(self, rows: slice) -> Tensor:
        """fp32 [rows, vocab]: what follows these rows of the stream, once it has passed the last layer."""
        assert self.finished, "layers remain"
        x = rms_norm(self.h[rows], self._norm, self.config.rms_norm_eps)
        logits = self._head.forward(x).float()
        if not bool(torch.isfinite(logits).all()):
            raise self._damaged("The head")
        return logits

    @cached_property
    def _norm(self) -> Tensor:
        return self._weights().tensor("norm.weight")

    @cached_property
    def _head(self) -> Linear:
        weights, tied = self._weights(), self.config.tie_word_embeddings
        return Linear(weights.tensor("embed_tokens.weight")) if tied else weights.linear("lm_head")

    def _weights(self) -> Weights:
        residence = self.residence
        return Weights(self.checkpoint, residence.device, residence.dtype, exact=residence.exact)

    def _load(self, observer: Observer) -> Block:
        block = load_block(self._weights(), self.residence, self.done, RouterStats(self.config))
        if not isinstance(block.ffn, MoE):
            return block
        if isinstance(block.ffn.experts, ExactExperts):
            block.ffn.experts.observe = observer.expert
        return replace(block, ffn=replace(block.ffn, observe=observer.routing))

    def _attend(self, block: Block) -> None:
        count, length = self.windows.shape
        # Room for all layers, of which only this one's rows are ever written and take memory.
        kv = self.residence.make_kv(self.config, length)
        pages: list[int] = []
        kv.extend(pages, length)
        for window in range(count):
            for past in range(0, length, ATTENDED_AT_ONCE):
                tokens = min(ATTENDED_AT_ONCE, length - past)
                self._attend_chunk(block, kv, window, Segment(0, tokens, past, tuple(pages)))

    def _attend_chunk(self, block: Block, kv: KVCache, window: int, segment: Segment) -> None:
        chunk = slice(segment.past, segment.past + segment.stop)
        batch = Batch(self.windows[window, chunk].to(self.residence.device), (segment,))
        cos, sin = self.rope.table(batch.positions())
        h = self.h.view(*self.windows.shape, -1)[window, chunk]
        h.copy_(block.attend(h, batch, kv, cos, sin))

    def _feed(self, block: Block) -> None:
        routed = isinstance(block.ffn, MoE) and self.residence.exact
        for h in self.h.split(ROUTED_AT_ONCE if routed else FED_AT_ONCE):
            h.copy_(block.feed(h))

    def _damaged(self, where: str) -> CheckpointError:
        path = self.checkpoint.path
        return CheckpointError(
            f"{where} of {path} gives values that are not numbers.", f"Check it: kimi-local doctor {path} --deep"
        )


def _require_memory(checkpoint: Checkpoint, residence: Residence, tokens: int) -> None:
    """Refuse what memory cannot hold: the widest layer, and the stream with what is computed from it."""
    config, itemsize = checkpoint.config, residence.dtype.itemsize
    experts = checkpoint.load_bytes(itemsize)["routed_experts"] // max(1, config.num_moe_layers)
    width = max(config.shared_intermediate_size, config.intermediate_size)
    resident = config.attention_params + 3 * config.hidden_size * width
    stream = 6 * tokens * config.hidden_size * itemsize
    needed, available = experts + resident * itemsize + stream, available_ram()
    if needed > available:
        raise DoesNotFit(
            f"{tokens:,} tokens and one layer take {needed / GIB:,.1f} GiB of memory ({stream / GIB:,.1f} GiB for the "
            f"tokens) and {available / GIB:,.1f} GiB are free.",
            "Nothing was read. Use fewer --tokens, or a machine with more memory.",
        )
