"""Rotary positions with YaRN: inverse frequencies, and the rotation of pairs."""

import math

import torch
from torch import Tensor

from hybrid.config import ModelConfig, RopeScaling, yarn_mscale


def _ramp(dim: int, theta: float, yarn: RopeScaling) -> Tensor:
    """0 where a pair turns often enough within the original context to be kept, 1 where it is interpolated."""

    def corrected(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(corrected(yarn.beta_fast)), 0)
    high = min(math.ceil(corrected(yarn.beta_slow)), dim - 1)
    span = (high - low) or 0.001  # as the original: equal ends make a step, not a division by zero
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """fp32 [qk_rope_head_dim / 2]: theta^(-2i/d), under YaRN blended with the same divided by `factor`."""
    dim = config.qk_rope_head_dim
    plain = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if config.rope_scaling is None:
        return plain.float()
    ramp = _ramp(dim, config.rope_theta, config.rope_scaling)
    return (plain * (1 - ramp) + plain / config.rope_scaling.factor * ramp).float()


def rotation_scale(config: ModelConfig) -> float:
    """The factor on cos and sin: mscale(mscale) / mscale(mscale_all_dim); 1 for every Kimi model."""
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0
    return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)


class Rope:
    """Cosines and sines by position; computed in fp32 for each step's positions, so the context costs no table."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.inverse_frequencies = inverse_frequencies(config).to(device)
        self.scale = rotation_scale(config)

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [tokens] -> cos, sin fp32 [tokens, dim / 2], on the device of the model."""
        angles = positions.to(self.inverse_frequencies.device).float()[:, None] * self.inverse_frequencies
        return angles.cos() * self.scale, angles.sin() * self.scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """Rotate x [tokens, ..., dim]; its pairs are adjacent, (x0, x1), (x2, x3), ..., if `interleave`, else a half apart.

    The pairs come out half apart. Queries and keys are permuted alike, so their dot products are those of any order.
    """
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (cos.shape[-1],)
    cos, sin = cos.view(shape), sin.view(shape)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, dim=-1)
    first, second = first.float(), second.float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
