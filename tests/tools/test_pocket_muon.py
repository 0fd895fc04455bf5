"""Optimizers against torch's own, and what QK-Clip promises."""

import pytest
import torch
from pocket.config import model_config
from pocket.model import Forward, Tokens, initial, initial_bias
from pocket.muon import adamw_step, global_norm, is_matrix, muon_step, orthogonal, qk_clip
from pocket.qat import multiplied
from torch import Tensor

from tests.tools.pocket_copy import TINY, Copy


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize("shape", [(3, 2, 24, 40), (4, 40, 24), (16, 48)])
def test_stacked_matrices_are_what_torch_makes_of_each(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    stacked = torch.randn(shape, generator=generator)
    singles = [torch.nn.Parameter(one.clone()) for one in stacked.reshape(-1, *shape[-2:])]
    theirs = torch.optim.Muon(singles, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    momentum = torch.zeros(shape)
    for _ in range(3):
        grad = torch.randn(shape, generator=generator)
        for single, part in zip(singles, grad.reshape(-1, *shape[-2:]), strict=True):
            single.grad = part.clone()
        theirs.step()
        muon_step(stacked, grad, momentum, lr=0.01, decay=0.1)
    expected = torch.stack([single.detach() for single in singles]).reshape(shape)
    assert torch.allclose(stacked, expected, atol=1e-3), "bf16 iterations in another order of sums"


def test_singular_values_move_to_one() -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 32, 64)).float())
    assert values.min() > 0.5 and values.max() < 1.3


def test_adamw_is_torchs() -> None:
    for shape, decay in (((6, 4), 0.1), ((5,), 0.0)):
        master = torch.randn(shape)
        single = torch.nn.Parameter(master.clone())
        theirs = torch.optim.AdamW([single], lr=0.01, betas=(0.9, 0.95), weight_decay=decay)
        mean, square = torch.zeros(shape), torch.zeros(shape)
        for step in range(1, 4):
            single.grad = torch.randn(shape)
            adamw_step(master, single.grad, mean, square, lr=0.01, decay=0.1, step=step)
            theirs.step()
        assert torch.allclose(master, single.detach(), atol=1e-6)


def test_who_updates_what() -> None:
    masters = initial(model_config(TINY), 0)
    apart = {name for name, master in masters.items() if not is_matrix(name, master)}
    routers = {f"layers.{layer}.mlp.gate.weight" for layer in (1, 2)}
    assert {name for name in apart if "norm" not in name} == {"embed_tokens.weight", "lm_head.weight", *routers}


def test_the_norm_of_all() -> None:
    assert global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]) == pytest.approx(5)


def largest(masters: dict[str, Tensor]) -> Tensor:
    """[layers, heads] on a fixed batch, computed in fp32."""
    config = model_config(TINY)
    batch = Copy().batch(0, 4, 64)
    tokens = Tokens.of(*batch, config.num_attention_heads)
    forward = Forward(config, multiplied(masters, torch.float32, bits=None), initial_bias(config))
    return forward.hidden(tokens)[1].largest


def test_clipped_heads_reach_tau_and_the_others_stay() -> None:
    """In the first layer, where nothing before it has changed; logits there are linear in what is scaled."""
    config, masters = model_config(TINY), initial(model_config(TINY), 0)
    before = largest(masters)
    tau = float(before[0].sort().values[1:3].mean())
    only_first = torch.where(torch.arange(len(before))[:, None] == 0, before, torch.zeros(()))
    untouched = masters["layers.0.self_attn.kv_a_proj_with_mqa.weight"].clone()
    assert qk_clip(masters, config, only_first, tau) == 2
    after = largest(masters)
    over = before[0] > tau
    assert torch.allclose(after[0][over], torch.full((2,), tau), rtol=0.01), "bf16 rounding of the weights"
    assert torch.equal(after[0][~over], before[0][~over])
    assert torch.equal(masters["layers.0.self_attn.kv_a_proj_with_mqa.weight"], untouched)


def test_nothing_above_tau_changes_nothing() -> None:
    masters = initial(model_config(TINY), 0)
    copies = {name: master.clone() for name, master in masters.items()}
    assert qk_clip(masters, model_config(TINY), torch.full((3, 4), 99.0), 100.0) == 0
    assert all(torch.equal(masters[name], copies[name]) for name in masters)
