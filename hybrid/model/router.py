"""Choosing experts: scores in fp32, the correction bias in the choice only, never in the weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.checkpoint.header import REFETCH
from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError
from hybrid.model.layers import Weights


@dataclass(frozen=True)
class Router:
    config: ModelConfig
    weight: Tensor  # fp32 [experts, hidden]
    bias: Tensor | None  # fp32 [experts]; e_score_correction_bias

    @classmethod
    def load(cls, config: ModelConfig, weights: Weights, prefix: str) -> "Router":
        """Gate and bias as stored, taken to fp32 and never through bf16.

        Raises CheckpointError for a bias that is not finite: it takes no part in any sum, so it would never show.
        """
        noaux = config.topk_method == "noaux_tc"
        bias = weights.stored(f"{prefix}.e_score_correction_bias").float() if noaux else None
        if bias is not None and not bool(torch.isfinite(bias).all()):
            raise CheckpointError(f"{prefix}.e_score_correction_bias holds values that are not numbers.", REFETCH)
        return cls(config, weights.stored(f"{prefix}.weight").float(), bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, hidden] -> topk_ids int64 and topk_weights fp32, both [tokens, num_experts_per_tok]."""
        logits = torch.nn.functional.linear(x.float(), self.weight)
        scores = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        choice = scores if self.bias is None else scores + self.bias
        topk_ids = self._within_groups(choice).topk(self.config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(1, topk_ids)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return topk_ids, weights * self.config.routed_scaling_factor

    def _within_groups(self, choice: Tensor) -> Tensor:
        """Scores with all but the best `topk_group` of `n_group` groups of experts at -inf.

        A group is worth the sum of its two best experts (noaux_tc) or its best one (group_limited_greedy).
        """
        config = self.config
        if config.n_group <= 1 or config.topk_method == "greedy":
            return choice
        groups = choice.view(len(choice), config.n_group, -1)
        best = 2 if config.topk_method == "noaux_tc" else 1
        kept = groups.topk(best, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones(len(choice), config.n_group, dtype=torch.bool, device=choice.device)
        dropped.scatter_(1, kept, False)
        return groups.masked_fill(dropped[:, :, None], -torch.inf).view_as(choice)
