"""INT4 weights in groups of 32 that keep a layer's outputs, not its weights, close: GPTQ with a scale search.

Columns are rounded one after the other, and the error of each is compensated by changing those not yet rounded, as far
as the inputs' second moments say that helps (Frantar et al. 2022, arXiv:2210.17323). The scale of each group is chosen
when its turn comes, by trying several and weighing errors by what cannot be compensated.
"""

import torch
from torch import Tensor

from quant.scales import search

GROUP = 32
DAMPING = 0.05  # of the mean diagonal, added to the second moments: they come from few tokens


def quantize(weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize weight [batch, out, in] for inputs with second moments E[x x^T] [batch, in, in].

    Returns codes int8 [batch, out, in] in -8..7 and scales bf16 [batch, out, in / 32]; W = code * scale.
    """
    weight = weight.clone()
    factor = _inverse_factor(moments)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(*weight.shape[:2], weight.shape[2] // GROUP, dtype=torch.bfloat16)
    for group in range(scales.shape[2]):
        start, end = group * GROUP, (group + 1) * GROUP
        block = factor[:, start:end, start:end]
        scale = search_scale(weight[:, :, start:end], block.diagonal(dim1=1, dim2=2).pow(-2)[:, None])
        scales[:, :, group] = scale
        codes[:, :, start:end], errors = _round_group(weight[:, :, start:end], scale.float(), block)
        weight[:, :, end:] -= errors @ factor[:, start:end, end:]
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 [..., out, in] from codes and scales as `quantize` returns them."""
    return codes.float() * scales.float().repeat_interleave(GROUP, -1)


def search_scale(group: Tensor, importance: Tensor) -> Tensor:
    """bf16 [batch, out]: the scale of group [batch, out, 32] with the least rounding error, weighted by `importance`
    (broadcast). No larger than needed for the largest magnitude, smaller where clipping it pays."""
    weights = importance.expand_as(group).reshape(-1, GROUP)
    bits = search(group.reshape(-1, GROUP).numpy(), weights.numpy())
    return torch.from_numpy(bits).view(torch.bfloat16).view(group.shape[:2])


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor U of the damped moments' inverse, U^T U. 1 / U[j, j]^2 is how much of input j's
    variance the inputs after it leave unexplained."""
    damping = DAMPING * moments.diagonal(dim1=1, dim2=2).mean(-1)
    damped = moments + (damping[:, None] * torch.ones(moments.shape[1])).diag_embed()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _round_group(weight: Tensor, scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Round the 32 columns of weight [batch, out, 32] in order; returns codes int8 and the errors to pass on."""
    weight = weight.clone()
    codes = torch.empty(weight.shape, dtype=torch.int8)
    errors = torch.empty_like(weight)
    for j in range(GROUP):
        column = weight[:, :, j]
        code = (column / scale).round().clamp(-8, 7)
        codes[:, :, j] = code
        errors[:, :, j] = (column - code * scale) / factor[:, j, j, None]
        weight[:, :, j + 1 :] -= errors[:, :, j, None] * factor[:, None, j, j + 1 :]
    return codes, errors
