"""Before any training, some heads look one token back, and others find a word by what it is."""

import pytest
import torch
from pocket.config import model_config
from pocket.model import initial
from torch import Tensor

from hybrid.config import ModelConfig
from hybrid.model.layers import rms_norm
from hybrid.model.rope import Rope, rotate

TOKENS, FIRST, AGAIN = 40, 10, 30


@pytest.fixture(scope="module")
def shares() -> list[Tensor]:
    """Attention of the first two layers, [heads, tokens, tokens] each, to different tokens of which one comes again."""
    config = model_config()
    masters = initial(config, 0)
    ids = torch.randperm(3000, generator=torch.Generator().manual_seed(1))[:TOKENS]
    ids[AGAIN] = ids[FIRST]
    h = masters["embed_tokens.weight"][ids]
    found = []
    for layer in range(2):
        share, out = attend(masters, f"layers.{layer}.self_attn", config, h)
        found.append(share)
        h = h + out
    return found


def attend(masters: dict[str, Tensor], at: str, config: ModelConfig, h: Tensor) -> tuple[Tensor, Tensor]:
    """MLA in fp32, written out head by head."""

    def project(name: str, x: Tensor) -> Tensor:
        return normed(x) @ masters[f"{at}.{name}.weight"].T

    cos, sin = Rope(config, h.device).table(torch.arange(len(h)))
    latent, k_pe = project("kv_a_proj_with_mqa", h).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
    queries = project("q_b_proj", project("q_a_proj", h)).chunk(config.num_attention_heads, dim=-1)
    kvs = project("kv_b_proj", latent).chunk(config.num_attention_heads, dim=-1)
    k_pe = rotate(k_pe, cos, sin, config.rope_interleave)
    shares, outs = [], []
    for query, kv in zip(queries, kvs, strict=True):
        q_nope, q_pe = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        k_nope, v = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        scores = q_nope @ k_nope.T + rotate(q_pe, cos, sin, config.rope_interleave) @ k_pe.T
        scores = scores * config.softmax_scale + torch.full_like(scores, -torch.inf).triu(1)
        shares.append(scores.softmax(-1))
        outs.append(shares[-1] @ v)
    return torch.stack(shares), torch.cat(outs, dim=-1) @ masters[f"{at}.o_proj.weight"].T


def normed(x: Tensor) -> Tensor:
    return rms_norm(x, torch.ones(x.shape[-1]), 1e-5)


def test_two_heads_of_the_first_layer_look_one_token_back(shares: list[Tensor]) -> None:
    assert (shares[0][-2:].diagonal(-1, dim1=1, dim2=2) > 0.9).all()
    assert (shares[0][:-2].diagonal(-1, dim1=1, dim2=2).mean(-1) < 0.3).all()


def test_some_heads_find_the_same_token(shares: list[Tensor]) -> None:
    for heads in shares:
        assert (heads[[0, 4], AGAIN, FIRST] > 0.25).all()


def test_some_heads_find_what_came_after_it(shares: list[Tensor]) -> None:
    assert (shares[1][[1, 5], AGAIN, FIRST + 1] > 0.8).all()


def test_threads_do_not_matter() -> None:
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(initial(model_config(), 3))
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
