"""The training loop: a step is a pure function of the state and the step's number, so a killed run loses nothing.

A batch is cut into shards of a fixed number of rows. Each thread computes whole shards with single-threaded torch,
which uses two cores far better than threads inside every small operation, and gradients are added in the order of the
shards: any number of threads gives the same bits.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hybrid.errors import KimiError
from pocket.model import Forward, Tokens
from pocket.muon import adamw_step, global_norm, is_matrix, muon_step, qk_clip
from pocket.qat import BITS, multiplied
from pocket.record import Log, Measured, show
from pocket.state import CHECKPOINT, FROZEN_SHARE, LOG, Settings, State

SAVE_SECONDS = 300.0
Grads = dict[str, Tensor]


class Batch(Protocol):
    """Rows of packed documents, each array [rows, length]; see pocket.dataset."""

    ids: Tensor
    positions: Tensor
    documents: Tensor
    weights: Tensor


class Data(Protocol):
    def batch(self, step: int, rows: int, length: int) -> Batch: ...


@dataclass(frozen=True)
class Shard:
    """What a part of the batch gives; sums, not means."""

    grads: Grads
    loss: float
    first: int
    largest: Tensor
    loads: Tensor


class Trainer:
    """Owns the state and the threads; use as a context manager."""

    def __init__(self, settings: Settings, state: State, data: Data, threads: int = 1) -> None:
        assert settings.rows % settings.shard_rows == 0, "shards are of equal size"
        self.settings, self.config, self.state, self.data = settings, settings.config, state, data
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self._next: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def step(self) -> Measured:
        """Do one step and report on it."""
        settings, state = self.settings, self.state
        batch = self._batch(state.step)
        weights = self._weights(settings.qat_bits if state.step >= settings.qat_from else None)
        total = float(batch.weights.sum())
        starts = range(0, settings.rows, settings.shard_rows)
        shards = [self.pool.submit(self._shard, weights, batch, slice(s, s + settings.shard_rows)) for s in starts]
        self._prepare(state.step + 1)
        done = [shard.result() for shard in shards]
        loads = sum((shard.loads for shard in done[1:]), done[0].loads)
        largest = torch.stack([shard.largest for shard in done]).amax(0)
        norm = self._update([shard.grads for shard in done], total)
        clipped = qk_clip(state.masters, self.config, largest, settings.tau) if settings.tau else 0
        if state.step < settings.freeze_from:
            self._balance(loads)
        state.step += 1
        loss, first = sum(shard.loss for shard in done) / total, sum(shard.first for shard in done)
        tokens, targets = int((batch.documents >= 0).sum()), int((batch.weights > 0).sum())
        return Measured.of(state.step, tokens, loss, first / targets, norm, largest, clipped, loads)

    def _batch(self, step: int) -> Batch:
        if self._next is None or self._next[0] != step:
            self._prepare(step)
        assert self._next is not None
        return self._next[1].result()

    def _prepare(self, step: int) -> None:
        """Have a batch made by whichever thread is free first."""
        self._next = (step, self.pool.submit(self.data.batch, step, self.settings.rows, self.settings.length))

    def _weights(self, bits: int | None) -> Grads:
        names = self.state.masters

        def leaf(name: str) -> Tensor:
            one = multiplied({name: names[name]}, self.settings.dtype, bits=bits)
            return one[name].requires_grad_()

        return dict(zip(names, self.pool.map(leaf, names), strict=True))

    def _shard(self, weights: Grads, batch: Batch, rows: slice) -> Shard:
        parts = (batch.ids[rows], batch.positions[rows], batch.documents[rows], batch.weights[rows])
        tokens = Tokens.of(*parts, self.config.num_attention_heads)
        loss, first, rest = Forward(self.config, weights, self.state.bias).loss(tokens)
        grads = torch.autograd.grad(loss, list(weights.values()))
        return Shard(dict(zip(weights, grads, strict=True)), loss.item(), int(first), rest.largest, rest.loads)

    def _update(self, shards: list[Grads], total: float) -> float:
        """Add the shards' gradients, clip them together, let each tensor's optimizer act; returns their norm."""
        masters = self.state.masters

        def added(name: str) -> Tensor:
            grad = shards[0][name].float()
            for shard in shards[1:]:
                grad += shard[name]
            return grad.div_(total)

        grads = list(self.pool.map(added, masters))
        norm = global_norm(grads)
        if not norm < float("inf"):
            raise KimiError(f"Training diverged at step {self.state.step}.", "Start again with a lower --lr.")
        scale = min(1.0, self.settings.clip_norm / (norm + 1e-12))
        list(self.pool.map(self._optimize, masters, (grad.mul_(scale) for grad in grads)))
        return norm

    def _optimize(self, name: str, grad: Tensor) -> None:
        state, rate, decay = self.state, self.settings.rate(self.state.step), self.settings.weight_decay
        master, mean = state.masters[name], state.mean[name]
        if is_matrix(name, master):
            muon_step(master, grad, mean, rate, decay, self.settings.dtype)
        else:
            adamw_step(master, grad, mean, state.square[name], rate, decay, state.step + 1)

    def _balance(self, loads: Tensor) -> None:
        """Raise the bias of experts that got less than the mean, lower that of the others; no loss is involved."""
        for bias, load in zip(self.state.bias.values(), loads.double(), strict=True):
            bias += self.settings.gamma * torch.sign(load.mean() - load).float()


def train(run: Path, data: Data, threads: int = 1, *, log_every: int = 10, save_seconds: float = SAVE_SECONDS) -> State:
    """Begin or continue the run whose settings are in `run`, up to its last step; returns the final state."""
    settings = Settings.load(run)
    path = run / CHECKPOINT
    state = State.load(path) if path.exists() else State.new(settings.config, settings.seed)
    log = Log(run / LOG, state.step)
    with Trainer(settings, state, data, threads) as trainer:
        saved = time.monotonic()
        for measured in timed(trainer.step, settings.steps - state.step):
            log.add(measured, settings.rate(state.step - 1), every=log_every)
            show(measured, settings.steps)
            if state.step in (settings.decay_from, settings.qat_from):
                state.save(run / f"step-{state.step:06}.safetensors")  # for experiments on how to end
            if time.monotonic() - saved > save_seconds:
                state.save(path)
                saved = time.monotonic()
        state.save(path)
    return state


def timed(step: Callable[[], Measured], count: int) -> Iterator[Measured]:
    """`count` steps, each knowing how long it took."""
    for _ in range(count):
        start = time.perf_counter()
        measured = step()
        measured.seconds = time.perf_counter() - start
        yield measured


def seconds_per_step(settings: Settings, data: Data, threads: int) -> float:
    """Measured over a few steps of a throw-away run, after two that warm up."""
    with Trainer(settings, State.new(settings.config, settings.seed), data, threads) as trainer:
        times = [measured.seconds for measured in timed(trainer.step, 6)]
    return sum(times[2:]) / len(times[2:])


def branch(
    run: Path,
    checkpoint: str,
    new: Path,
    *,
    qat_steps: int,
    steps: int | None = None,
    plateau: int = 0,
    lr: float | None = None,
    qat_bits: int = BITS,
) -> Settings:
    """Make `new` a run that continues `checkpoint` of `run` for `steps` steps, by default as the run itself goes on.

    The rate stays on its plateau, or on a new one of `lr`, for the first `plateau` steps and falls from then on;
    without `steps`, it is that of the run. Experts have `qat_bits` in the last `qat_steps`. Two branches that differ in
    these alone see the same data at the same rates. Raises KimiError if `new` exists.
    """
    if new.exists():
        raise KimiError(f"{new} already exists.", "Choose another directory.")
    state, old = State.load(run / checkpoint), Settings.load(run)
    end = old.steps if steps is None else state.step + steps
    changed: dict[str, Any] = {"steps": end, "qat_from": end - qat_steps, "qat_bits": qat_bits}
    if steps is not None:
        changed |= {"decay_from": state.step + plateau, "freeze_from": end - round(steps * FROZEN_SHARE)}
    if lr is not None:
        changed |= {"lr": lr, "earlier": [*old.earlier, [state.step, old.lr]]}
    settings = dataclasses.replace(old, **changed)
    new.mkdir(parents=True)
    state.save(new / CHECKPOINT)
    shutil.copyfile(run / LOG, new / LOG)  # lines behind the checkpoint are dropped when the run begins
    settings.save(new)
    return settings
