"""Experts that get many tokens of a chunk: decoded, and multiplied by torch in floating point, where that is faster.

Torch reaches the matrix units that some processors have (AMX, AVX-512-BF16). From how many tokens of an expert on it
beats our integer kernels depends on the processor, the formats and the model's shapes, and may be never: it is timed
when the first chunk comes that is large enough to matter, in a fraction of a second, and remembered. Activations are
rounded to bf16 or not at all, which loses less than int8. Nothing less than LEAST tokens goes this way unless told to,
so that a step of few answers computes each of them as it would be alone.
"""

import math
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numba
import numpy as np
import platformdirs
import torch
from torch import Tensor

from hybrid.checkpoint.blob import Formats
from hybrid.config import ModelConfig
from hybrid.memory.remembered import recall, remember
from quant import ISA, kernels, trellis_moe
from quant.cpu import MULTIPLIES_BF16
from quant.gemm import BF16, FP32, Gemm, Layer, sample

LEAST = 33  # tokens of an expert: a step of 32 answers never has as many
TIMED = (LEAST - 1, 96)  # numbers of tokens that are timed
MOST = 1024  # further out than that nothing is foretold from those
MATTERS = 1e9  # weights times tokens of a layer, some milliseconds, below which there is nothing to gain
QUICK = 0.05  # seconds below which a timing is repeated
NEVER = 0
NOBODY = np.zeros(0, np.int64)

Kernel = Callable[..., np.ndarray]  # of a layer, x, ids and weights


def product(x: np.ndarray, w: np.ndarray, out: np.ndarray) -> None:
    """out [n, rows] = x [n, columns] @ w [columns, rows] by torch: fp32, or uint16 that are bits of bf16."""
    torch.mm(_tensor(x), _tensor(w), out=_tensor(out))


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype == FP32:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def fastest() -> np.dtype:
    """bf16 where this processor multiplies it in hardware."""
    return BF16 if MULTIPLIES_BF16 else FP32


def torch_gemm(threads: int) -> Gemm:
    """For benchmarks: torch's products, from now on by so many threads."""
    torch.set_num_threads(threads)
    return Gemm(product, fastest())


class ManyTokens:
    """Who goes this way, and the products. One for all layers of a model; used from one thread at a time."""

    def __init__(self, config: ModelConfig, from_tokens: int | None = None) -> None:
        """Experts with `from_tokens` tokens of a chunk and more go this way, or none if it is NEVER; None measures."""
        assert from_tokens is None or from_tokens >= 0, from_tokens
        self.from_tokens = from_tokens
        self.gemm = Gemm(product, fastest())
        self._shape = config.hidden_size, config.moe_intermediate_size
        self._weights = config.expert_params
        self._crossovers: dict[Formats, int] = {}

    def chosen(self, formats: Sequence[Formats], ids: np.ndarray) -> np.ndarray:
        """int64, ascending: those of the experts in `ids` [tokens, k] that go this way; formats of every expert."""
        least = LEAST if self.from_tokens is None else self.from_tokens
        if least == NEVER or ids.size < least:
            return NOBODY
        counts = np.bincount(ids.reshape(-1), minlength=len(formats))
        likely = np.flatnonzero(counts >= least)
        if self.from_tokens is not None:
            return likely
        if not self._matters(counts[likely].sum()):
            return NOBODY
        found = [e for e in likely.tolist() if NEVER < self.crossover(formats[e]) <= counts[e]]
        return np.array(found, np.int64)

    def moe(
        self, layer: Layer, formats: Sequence[Formats], x: np.ndarray, ids: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """As `quant.kernels.moe`, whose sum over the other experts comes first; then these, ascending."""
        kernel, chosen = kernel_of(layer), self.chosen(formats, ids)
        if not chosen.size:
            return kernel(layer, x, ids, weights)
        y = kernel(layer, x, np.where(np.isin(ids, chosen), -1, ids), weights)
        self.gemm.add_all(layer, chosen.tolist(), x, ids, weights, y)
        return y

    def outputs(self, layer: Layer, expert: int, x: np.ndarray) -> np.ndarray:
        """fp32 [n, hidden]: what an expert makes of x, not weighted; `moe` adds the same bits."""
        y = np.zeros_like(x)
        self.gemm.add(layer, expert, x, np.arange(len(x)), np.ones(len(x), np.float32), y)
        return y

    def compile(self, formats: Formats, pairs: int) -> None:
        """Have what experts of such formats need compiled, if a chunk with `pairs` of a token and an expert matters."""
        if self.from_tokens != NEVER and (self.from_tokens is not None or self._matters(pairs)):
            self.outputs(sample(formats, 64, 64), 0, np.zeros((1, 64), np.float32))

    def crossover(self, formats: Formats) -> int:
        """Tokens from which experts of such formats go this way, or NEVER; measured if it is not known."""
        if formats not in self._crossovers:
            key, name, known = self._key(), "+".join(formats), recall(_path())
            found = known.get(key)
            found = found if isinstance(found, dict) else {}
            if not isinstance(found.get(name), int):
                found[name] = self._measure(formats)
                remember(_path(), {**known, key: found})
            self._crossovers[formats] = found[name]
        return self._crossovers[formats]

    def _matters(self, pairs: int) -> bool:
        return pairs * self._weights >= MATTERS

    def _key(self) -> str:
        threads, shape = numba.get_num_threads(), "x".join(map(str, self._shape))
        return f"{platform.node()} {ISA} {threads} torch {torch.__version__} {self.gemm.dtype} {shape}"

    def _measure(self, formats: Formats) -> int:
        layer, rng = sample(formats, *self._shape), np.random.default_rng(0)
        kernel, x = kernel_of(layer), rng.standard_normal((max(TIMED), self._shape[0]), np.float32)
        ids, weights = np.zeros((len(x), 1), np.int64), np.ones((len(x), 1), np.float32)
        self.compile(formats, math.ceil(MATTERS))
        kernel(layer, x[:1], ids[:1], weights[:1])
        ours = [_seconds(partial(kernel, layer, x[:n], ids[:n], weights[:n])) for n in TIMED]
        theirs = [_seconds(partial(self.outputs, layer, 0, x[:n])) for n in TIMED]
        return crossing(TIMED, ours, theirs)


def kernel_of(layer: Layer) -> Kernel:
    """The integer kernels that read a layer."""
    return trellis_moe.moe if isinstance(layer, trellis_moe.TrellisExperts) else kernels.moe


def crossing(tokens: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> int:
    """Tokens, LEAST or more, from which `theirs` takes less time than `ours`, by lines through the seconds of each at
    two numbers of tokens. NEVER if they do not cross, or beyond MOST."""
    begin, behind = tokens[0], theirs[0] - ours[0]
    gain = ((ours[1] - ours[0]) - (theirs[1] - theirs[0])) / (tokens[1] - tokens[0])  # seconds per further token
    if behind <= 0:
        return LEAST if ours[1] > theirs[1] else NEVER
    if gain <= 0 or begin + behind / gain > MOST:
        return NEVER
    return max(LEAST, math.ceil(begin + behind / gain))


def _seconds(run: Callable[[], object]) -> float:
    """The better of two runs, or one where that takes long."""
    found: list[float] = []
    while len(found) < 2 and sum(found) < QUICK:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def _path() -> Path:
    return platformdirs.user_cache_path("kimi-local") / "many-tokens.json"
