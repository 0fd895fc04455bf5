"""INT4 in groups of 32 for the routed experts while training: the forward pass multiplies what will be released.

Fewer bits are the same with fewer codes; a checkpoint holds these as INT4 too.
"""

import torch
from torch import Tensor

from hybrid.errors import KimiError
from pocket.config import GROUP
from pocket.model import DOWN, GATE_UP, Weights, rounded

BITS = 4
TINY = 1e-12  # stands for the largest magnitude of a group of zeros
# Scales tried, relative to the one that just reaches the group's largest magnitude. Of normal weights, the first alone
# misses 9.7 %, the best of the three 8.9 %, the best of nineteen 8.6 %; and training with three ended at a lower loss.
# With fewer codes, those three of seventeen that together miss least of normal weights: 18.2 and 37.4 %.
REACHES = {4: (1.0, 0.9, 0.8), 3: (0.85, 0.75, 0.65), 2: (0.55, 0.45, 0.35)}


def codes_and_scales(weight: Tensor, bits: int = BITS) -> tuple[Tensor, Tensor]:
    """fp32 [..., in] -> codes int8 [..., in], scales bf16 [..., in / 32]: the best of a few for each group.

    Codes of 4 bits are -8..7, of 3 bits -4..3, of 2 bits -2..1.
    """
    groups = weight.unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    tried = torch.stack([(largest * (reach / _highest(bits))).clamp_(min=TINY).bfloat16() for reach in REACHES[bits]])
    errors = torch.stack([_missed(groups, scales, bits) for scales in tried])
    scales = tried.gather(0, errors.argmin(0, keepdim=True))[0]
    return _codes(groups, scales, bits).flatten(-2).to(torch.int8), scales


def _highest(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _codes(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    return (groups / _wide(scales)).round_().clamp_(-_highest(bits) - 1, _highest(bits))


def _missed(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The squared error of each group."""
    return _codes(groups, scales, bits).mul_(_wide(scales)).sub_(groups).square_().sum(-1)


def _wide(scales: Tensor) -> Tensor:
    return scales.float()[..., None]


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 [..., in]: code * scale."""
    return (codes.unflatten(-1, (-1, GROUP)) * _wide(scales)).flatten(-2)


def multiplied(masters: Weights, dtype: torch.dtype, *, bits: int | None) -> dict[str, Tensor]:
    """What the forward pass multiplies: `masters` bf16, and experts in `bits` unless None."""
    experts = {name: master for name, master in masters.items() if bits and is_expert(name)}
    found = rounded({name: master for name, master in masters.items() if name not in experts}, dtype)
    return found | {name: decoded(*codes_and_scales(m.detach(), bits or BITS)).to(dtype) for name, m in experts.items()}


def kept_bits(experts: str) -> int | None:
    """The bits that "int4", "int3" and "int2" stand for, None for "bf16"; raises KimiError for anything else."""
    kinds = {"bf16": None} | {f"int{bits}": bits for bits in REACHES}
    if experts not in kinds:
        raise KimiError(f"Experts cannot be kept as {experts}.", f"Choose one of {', '.join(kinds)}.")
    return kinds[experts]


def is_expert(name: str) -> bool:
    """Whether a tensor holds the routed experts of a layer."""
    return name.endswith((GATE_UP, DOWN))
