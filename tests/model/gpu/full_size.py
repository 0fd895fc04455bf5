"""The whole text model at its real size on a card that does not exist: what a prefill chunk and a decode step take."""

from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hybrid.checkpoint.expected import expected_tensors
from hybrid.config import ModelConfig
from hybrid.memory.expert_cache import CopiesAtOnce, ExpertCache
from hybrid.memory.expert_store import PackedExperts
from hybrid.model import transformer
from hybrid.model.batch import Batch, Segment
from hybrid.model.gpu import Card
from hybrid.model.gpu.matrix import CardMatrix
from hybrid.model.layers import CardLinear, Linear, Weights
from hybrid.model.transformer import Residence, Transformer
from quant import int4_g32, int8_g32, trellis, trellis_moe
from tests.model.gpu.fake_cuda import CUDA, Answers, Memory


class Taken(NamedTuple):
    """Bytes of the card, but for CUDA's own; a peak is what a step takes beside weights and KV cache."""

    weights: int
    kv: int
    slots: int
    prefill_peak: int
    decode_peak: int
    kernels: dict[str, int]  # how often each of ours was started in the decode step

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.slots + max(self.prefill_peak, self.decode_peak)


class HollowCheckpoint:
    """Every resident tensor of a model by name and shape."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.shapes = {name: spec.shape for name, spec in expected_tensors(config).items()}
        self.fp32 = {name for name, spec in expected_tensors(config).items() if spec.dtypes == {"F32"}}

    def has(self, name: str) -> bool:
        return name in self.shapes

    def tensor(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], dtype=torch.float32 if name in self.fp32 else torch.bfloat16)

    def linear(self, prefix: str, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.shapes[f"{prefix}.weight"], dtype=dtype)

    def matrix(self, prefix: str) -> Tensor:
        return self.tensor(f"{prefix}.weight")


class HostExperts(PackedExperts):
    """Routed experts in the host's memory, all in one format: rows go there and come back."""

    def __init__(self, config: ModelConfig, format: str = "trellis2") -> None:
        hidden, inner, count = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        size = trellis.matrix_bytes(format, 2 * inner, hidden) + trellis.matrix_bytes(format, hidden, inner)
        signs = (np.ones(hidden, np.int8), np.ones(inner, np.int8))
        held = trellis_moe.experts(np.zeros(0, np.uint8), np.arange(count) * size, [(format, format)] * count, signs)
        super().__init__(partial(trellis_moe.moe, held), np.full(count, size))

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=torch.float32).to(x.device)


def packed_weights(bits: int) -> type[Weights]:
    """Weights whose matrices are kept in int8_g32 or int4_g32, but for the head, which is int8, and kv_b_proj."""

    class PackedWeights(Weights):
        def linear(self, prefix: str) -> Linear:
            assert self.card is not None
            rows, columns = self.checkpoint.matrix(prefix).shape
            kept = 8 if prefix == "lm_head" else bits
            each, width = (int8_g32.BLOCK, 32) if kept == 8 else (int4_g32.BLOCK, 64)
            blocks = torch.empty(-(-rows // 32), -(-columns // width), each, dtype=torch.uint8, device=CUDA)
            self.matrix_bytes += blocks.nbytes
            return CardLinear(self.card, CardMatrix(f"int{kept}_g32", blocks, rows, columns))

    return PackedWeights


def measure(
    config: ModelConfig,
    *,
    resident: str = "bf16",
    ctx: int = 32768,
    chunk: int = 8192,
    slots: int = 0,
    kv: str = "bf16",
) -> Taken:
    """Load, prefill `chunk` tokens (0: none) from the first on, then decode the last of `ctx`.

    `resident` is bf16, int8 or int4, `kv` how the cache is kept; with `slots` for experts, every layer has some on the
    card and some on the host.
    """
    started: list[str] = []
    host = HostExperts(config)

    def launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        started.append(kernel.fn.__name__)

    memory = Memory()
    with ExitStack() as stack:
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), memory, Answers()):
            stack.enter_context(mode)
        stack.enter_context(patch.object(transformer, "load_experts", lambda *args, **kwargs: host))
        stack.enter_context(patch.object(transformer.RouterStats, "record", lambda *args: None))
        if resident != "bf16":
            stack.enter_context(patch.object(transformer, "Weights", packed_weights(int(resident[3:]))))
        residence = Residence(CUDA, torch.bfloat16, False, 1, card=Card(CUDA, launch), kv=kv)
        model = Transformer(HollowCheckpoint(config), residence)  # type: ignore[arg-type]
        weights = memory.live
        cache = residence.make_kv(config, ctx)
        with_kv = memory.live
        if slots:
            model.keep_hot(ExpertCache(config, slots, int(host.expert_bytes.max()), CUDA, CopiesAtOnce()))
        settled, pages = memory.live, tuple(range(-(-ctx // 64)))
        peaks = []
        for past, tokens in ((0, chunk), (ctx - 1, 1)) if chunk else ((ctx - 1, 1),):
            memory.peak = memory.live
            started.clear()
            step = Batch(torch.zeros(tokens, dtype=torch.int64), (Segment(0, tokens, past, pages),))
            logits = model.head(model.forward(step, cache).narrow(0, tokens - 1, 1))
            assert logits.shape == (1, config.vocab_size) and logits.device.type == "cuda"
            del logits
            peaks.append(memory.peak - settled)
    prefill, decode = (peaks[0] if chunk else 0), peaks[-1]
    kernels = {name: started.count(name) for name in sorted(set(started))}
    return Taken(weights, with_kv - weights, settled - with_kv, prefill, decode, kernels)
