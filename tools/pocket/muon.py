"""Muon for matrices, AdamW for the rest, and QK-Clip: what Moonshot calls MuonClip.

Muon replaces the momentum of a matrix by its nearest orthogonal one (five steps of Newton-Schulz), so that every
direction is learned at the same pace. That makes sense where a matrix maps one space to another. The rows of the
embedding, the head and the router are separate vectors that occur at very different rates, and norms are vectors:
AdamW, which scales each element by its own history, suits those.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hybrid.config import ModelConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic
MOMENTUM, STEPS, EPS = 0.95, 5, 1e-7
MATCH = 0.2  # the root mean square of AdamW's updates
BETAS = (0.9, 0.95)
APART = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")


def orthogonal(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[..., rows, columns] -> `dtype` of that shape: each matrix with its singular values moved close to 1."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = x.to(dtype).flatten(0, -3) if x.dim() > 2 else x.to(dtype)[None]
    y = y.mT if tall else y
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp_(min=EPS)
    for _ in range(STEPS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether Muon updates this tensor; AdamW has the others."""
    return tensor.dim() >= 2 and not name.endswith(APART)


@torch.no_grad()
def muon_step(
    master: Tensor, grad: Tensor, momentum: Tensor, lr: float, decay: float, dtype: torch.dtype = torch.bfloat16
) -> None:
    """One step of Muon with Nesterov momentum; changes `master` and `momentum`, [..., rows, columns] like `grad`.

    Leading dimensions are separate matrices. The update's size is matched to AdamW's, so one rate serves both. The
    iterations run in `dtype`.
    """
    momentum.lerp_(grad, 1 - MOMENTUM)
    update = orthogonal(grad.lerp(momentum, MOMENTUM), dtype)
    master.mul_(1 - lr * decay)
    master.add_(update, alpha=-lr * MATCH * math.sqrt(max(master.shape[-2:])))


@torch.no_grad()
def adamw_step(master: Tensor, grad: Tensor, mean: Tensor, square: Tensor, lr: float, decay: float, step: int) -> None:
    """One step of AdamW, the first with step 1; changes `master` and its two averages. Vectors do not decay."""
    mean.lerp_(grad, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    if master.dim() > 1:
        master.mul_(1 - lr * decay)
    root = (square / (1 - BETAS[1] ** step)).sqrt_().add_(1e-8)
    master.addcdiv_(mean, root, value=-lr / (1 - BETAS[0] ** step))


@torch.no_grad()
def qk_clip(masters: dict[str, Tensor], config: ModelConfig, largest: Tensor, tau: float) -> int:
    """Shrink the queries and keys of every head whose largest logit exceeded `tau`, so that it would have been tau.

    largest fp32 [layers, heads]. With gamma = tau / largest, the parts without position get sqrt(gamma) on either side;
    the rotated key is shared by all heads, so the rotated query gets all of gamma. Returns the number of heads clipped.
    """
    gammas = (tau / largest).clamp(max=1.0)
    for layer in (gammas < 1).any(1).nonzero().flatten().tolist():
        gamma, at = gammas[layer], f"layers.{layer}.self_attn"
        root, nope = gamma.sqrt()[:, None, None], config.qk_nope_head_dim
        queries = _by_head(masters[f"{at}.q_b_proj.weight"], config)
        queries[:, :nope] *= root
        queries[:, nope:] *= gamma[:, None, None]
        _by_head(masters[f"{at}.kv_b_proj.weight"], config)[:, :nope] *= root
    return int((gammas < 1).sum())


def _by_head(weight: Tensor, config: ModelConfig) -> Tensor:
    """A view [heads, rows of a head, in]."""
    return weight.view(config.num_attention_heads, -1, weight.shape[1])


def global_norm(grads: Iterable[Tensor]) -> float:
    """The Euclidean norm of all gradients together."""
    return math.sqrt(sum(float(grad.square().sum(dtype=torch.float64)) for grad in grads))
