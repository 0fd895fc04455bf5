"""Everything a training run needs to go on, in one file that is written whole or not at all."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybrid.checkpoint.durable import move_durably, write_durably
from hybrid.config import ModelConfig
from hybrid.errors import KimiError
from pocket.config import model_config
from pocket.model import initial, initial_bias
from pocket.muon import is_matrix
from pocket.qat import BITS

CHECKPOINT, SETTINGS, LOG = "checkpoint.safetensors", "settings.json", "log.jsonl"
TAU = 100.0  # as for K2
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
FROZEN_SHARE = 0.03  # last part of a run, in which the router's bias stays: frozen for longer, loads drift apart


def fastest_precision() -> str:
    """bf16 where the CPU has instructions for it; without them torch takes many times as long as in fp32."""
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run does; the same settings and data give the same weights, however often it is interrupted."""

    steps: int
    decay_from: int  # step from which the learning rate falls, linearly, to nothing
    qat_from: int  # step from which experts are multiplied in `qat_bits`; `steps` for never
    freeze_from: int  # step from which the router's bias stays as it is
    qat_bits: int = BITS
    seed: int = 0
    rows: int = 16
    length: int = 256
    shard_rows: int = 8  # rows computed together; shards run side by side and are added in order
    lr: float = 4e-3  # of the plateau
    earlier: list[list[float]] = field(default_factory=list)  # plateaus before it: [end, rate]
    warmup: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    tau: float | None = TAU  # largest attention logit that QK-Clip allows; None: no clipping
    gamma: float = 1e-2  # step of the router's bias; half of it took twice as long to spread the load
    precision: str = field(default_factory=fastest_precision)  # of products: bf16 or fp32; masters are fp32
    model: dict[str, Any] = field(default_factory=dict)  # keys of text_config that differ from the pocket model's

    @property
    def config(self) -> ModelConfig:
        return model_config(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def rate(self, step: int) -> float:
        """The learning rate: a linear rise, a plateau, a linear fall."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = (self.steps - step) / (self.steps - self.decay_from) if step >= self.decay_from else 1.0
        level = next((rate for end, rate in self.earlier if step < end), self.lr)
        return level * rise * fall

    def save(self, run: Path) -> None:
        write_durably(run / SETTINGS, (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, run: Path) -> "Settings":
        """Raises KimiError if `run` is no training run."""
        try:
            return cls(**json.loads((run / SETTINGS).read_text()))
        except FileNotFoundError as error:
            raise KimiError(f"{run} holds no training run.", "Give the directory of train --out.") from error


@dataclass
class State:
    """fp32 masters with their optimizer's averages: `mean` is Muon's momentum or Adam's mean, `square` is Adam's."""

    step: int  # done so far
    masters: dict[str, Tensor]
    bias: dict[int, Tensor]
    mean: dict[str, Tensor]
    square: dict[str, Tensor]

    @classmethod
    def new(cls, config: ModelConfig, seed: int) -> "State":
        masters = initial(config, seed)
        mean = {name: torch.zeros_like(master) for name, master in masters.items()}
        square = {name: torch.zeros_like(master) for name, master in masters.items() if not is_matrix(name, master)}
        return cls(0, masters, initial_bias(config), mean, square)

    def save(self, path: Path) -> None:
        """Durably, under its name only when complete."""
        parts = {"master": self.masters, "mean": self.mean, "square": self.square, "bias": self.bias}
        tensors = {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        temporary = path.with_suffix(".new")
        save_file(tensors, temporary, {"step": str(self.step)})
        move_durably(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "State":
        """Raises KimiError for a file that is missing or damaged."""
        parts: dict[str, dict[str, Tensor]] = {"master": {}, "mean": {}, "square": {}, "bias": {}}
        try:
            with safe_open(path, "pt") as file:
                step = int(file.metadata()["step"])
                for key in file.keys():  # noqa: SIM118 - not a dict
                    part, _, name = key.partition("/")
                    parts[part][name] = file.get_tensor(key)
        except (FileNotFoundError, SafetensorError) as error:
            raise KimiError(f"{path} cannot be read: {error}.", "Train again, or continue from another run.") from error
        bias = {int(layer): tensor for layer, tensor in sorted(parts["bias"].items())}
        return cls(step, parts["master"], bias, parts["mean"], parts["square"])
