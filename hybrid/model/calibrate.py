"""What a text makes of a model's experts, layer by layer: routing, second moments of inputs, sensitivities."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hybrid.checkpoint import Checkpoint
from hybrid.checkpoint.calibration import (
    CalibrationWriter,
    LayerStatistics,
    Manifest,
    file_bytes,
    fingerprint,
    keeps_full_hessians,
)
from hybrid.checkpoint.durable import explained
from hybrid.config import ModelConfig
from hybrid.errors import DoesNotFit, UsageError
from hybrid.memory.hardware import disk_free
from hybrid.model.streamed import Observer, Stream, on_cpu
from hybrid.progress import OnProgress, Progress, ignore

SUMMED_AT_ONCE = 4096  # tokens


class Tally:
    """Sums over the tokens of one layer of experts, in fp32 but for the few figures per expert, which are fp64."""

    def __init__(self, config: ModelConfig) -> None:
        experts, inner = config.n_routed_experts, config.moe_intermediate_size
        self.tokens = 0
        self.counts = np.zeros(experts, np.int64)
        self.mass = np.zeros(experts)
        self.outputs = np.zeros(experts)
        self.inputs = torch.zeros(config.hidden_size, config.hidden_size)
        self.squares = torch.zeros(experts, inner)
        self.products = torch.zeros(experts, inner, inner) if keeps_full_hessians(config) else None
        self.observer = Observer(self.routing, self.expert)

    def routing(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """x [tokens, hidden]; topk_ids and topk_weights [tokens, k]."""
        self.tokens += len(x)
        for part in x.float().split(SUMMED_AT_ONCE):
            self.inputs.addmm_(part.T, part)
        chosen, experts = topk_ids.view(-1).numpy(), len(self.counts)
        self.counts += np.bincount(chosen, minlength=experts)
        self.mass += np.bincount(chosen, topk_weights.reshape(-1).double().numpy(), minlength=experts)

    def expert(self, expert: int, weights: Tensor, inner: Tensor, outputs: Tensor) -> None:
        """weights [n], inner [n, intermediate], outputs [n, hidden] of the expert's tokens."""
        weighted = inner.float() * weights[:, None]
        self.squares[expert] += weighted.square().sum(0)
        if self.products is not None:
            self.products[expert].addmm_(weighted.T, weighted)
        self.outputs[expert] += float((weights.double() * outputs.norm(dim=-1).double()).square().sum())

    def statistics(self, residual_ms: float) -> LayerStatistics:
        """The sums as means; `residual_ms` is the mean squared length of the stream that entered the layer."""
        per_expert = np.maximum(self.counts, 1)
        divisor = torch.from_numpy(per_expert).float()
        return LayerStatistics(
            counts=self.counts,
            mass=self.mass.astype(np.float32),
            hessian_x=(self.inputs / self.tokens).numpy(),
            importance_h=(self.squares / divisor[:, None]).numpy(),
            hessian_h=None if self.products is None else (self.products / divisor[:, None, None]).numpy(),
            residual_ms=residual_ms,
            output_ms=(self.outputs / per_expert).astype(np.float32),
        )


def calibrate(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    texts: Sequence[tuple[str, str]],
    directory: Path,
    *,
    threads: int,
    on_progress: OnProgress = ignore,
) -> Path:
    """Write the calibration directory of `checkpoint` over `windows` of ids, in fp32; returns its path.

    `texts` are (name, sha256) of the files the windows were taken from. A run that was stopped is continued behind its
    last finished layer and gives the same bytes. Raises UsageError if the directory holds anything else, DoesNotFit if
    disk or memory are too small; should the disk fill up meanwhile, what is finished stays.
    """
    config = checkpoint.config
    if not config.num_moe_layers:
        raise UsageError(f"{checkpoint.path} has no routed experts to calibrate.", "Name a mixture-of-experts model.")
    _require_disk(config, len(windows) * len(windows[0]), directory)
    with explained(directory):
        writer = CalibrationWriter(directory, _manifest(checkpoint, windows, texts))
        if not writer.is_complete:
            _calibrate(checkpoint, windows, writer, threads, on_progress)
        return writer.finish()


def _calibrate(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    writer: CalibrationWriter,
    threads: int,
    on_progress: OnProgress,
) -> None:
    stream = Stream(checkpoint, on_cpu("float32", threads), windows)
    residual = writer.read_residual()
    if residual is not None:
        stream.resume(residual[0], torch.from_numpy(residual[1].copy()))
    while not stream.finished:
        on_progress(Progress("calibrate", stream.done, stream.config.num_hidden_layers, "layers"))
        _calibrate_layer(stream, writer)
    on_progress(Progress("calibrate", stream.done, stream.done, "layers"))


def _calibrate_layer(stream: Stream, writer: CalibrationWriter) -> None:
    """Take the next layer and keep what it gave; its statistics first, so that a residual stream never lacks them."""
    layer, config = stream.done, stream.config
    if config.is_moe_layer(layer):
        tally, residual_ms = Tally(config), _mean_square(stream.h)
        stream.step(tally.observer)
        writer.write_layer(layer, tally.statistics(residual_ms))
    else:
        stream.step()
    if not stream.finished:
        writer.write_residual(stream.done, stream.h.numpy())


def _mean_square(h: Tensor) -> float:
    """Mean over rows of |h|^2, [tokens, hidden]."""
    return float(h.norm(dim=-1).double().square().mean())


def _manifest(checkpoint: Checkpoint, windows: Sequence[Sequence[int]], texts: Sequence[tuple[str, str]]) -> Manifest:
    return Manifest(
        model=checkpoint.path.resolve().name,
        fingerprint=fingerprint(checkpoint),
        tokens=len(windows) * len(windows[0]),
        sequence=len(windows[0]),
        texts=[{"name": name, "sha256": digest} for name, digest in texts],
        layers=list(checkpoint.config.moe_layers),
        hessian_h="full" if keeps_full_hessians(checkpoint.config) else "diagonal",
    )


def _require_disk(config: ModelConfig, tokens: int, directory: Path) -> None:
    """Refuse a disk that cannot hold the result beside two residual streams; what is there already counts as free."""
    present = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    needed = config.num_moe_layers * file_bytes(config) + 2 * tokens * config.hidden_size * 4
    available = disk_free(directory) + present
    if needed > available:
        raise DoesNotFit(
            f"The calibration takes {needed / 1e9:,.1f} GB of disk and {directory} has {available / 1e9:,.1f} GB.",
            "Nothing was written. Choose a directory on another disk.",
        )
