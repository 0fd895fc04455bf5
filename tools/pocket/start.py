"""Attention to start from: some heads look one token back, others find the same token, or what followed the same one.

To find a word again by what it is takes queries and keys that agree through four matrices, and to say what came after
it a second head, whose output those keys read. From chance, 24 million tokens did not teach a model of this size to do
so. Starting near what is known to emerge (mimetic initialization, Trockman and Kolter, 2023) leaves everything to be
trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hybrid.config import ModelConfig
from hybrid.model.rope import Rope

SPREAD = 0.5  # of an embedding's elements
COMMON = 4.0  # what all embeddings share: the one thing to attend by position alone with
LOOK = 12.0  # logit of one pair of rotated dimensions, where a head looks back
MATCH = 1.5  # spread of the elements of queries and keys that are compared by content
KINDS = 4  # of so many heads, one matches tokens, the next predecessors, and the others start from chance


@contextmanager
def single_threaded() -> Iterator[None]:
    """Have torch compute the same bits whatever number of threads it has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def look_for_same(masters: dict[str, Tensor], config: ModelConfig, generator: torch.Generator) -> None:
    """Change fp32 masters in place. Half of the latent dimensions read what a token is, the others what was before it;
    the last two heads of the first layer write the latter."""
    hidden, half = config.hidden_size, config.kv_lora_rank // 2
    assert 1 + 2 * half <= hidden and 2 * half < (config.q_lora_rank or 0)
    basis = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0].T
    common, here, before = basis[0], basis[1 : 1 + half], basis[1 + half : 1 + 2 * half]
    embedding = masters["embed_tokens.weight"]
    for taken in (common[None], before):
        embedding -= embedding @ taken.T @ taken
    embedding += COMMON * common
    for layer in range(config.num_hidden_layers):
        at = f"layers.{layer}.self_attn"
        for name in ("kv_a_proj_with_mqa", "q_a_proj"):
            masters[f"{at}.{name}.weight"][: 2 * half] = torch.cat((here, before))
        _match(masters, at, config, generator)
    _look_back(masters, config, common)
    _tell(masters, config, before)


def _match(masters: dict[str, Tensor], at: str, config: ModelConfig, generator: torch.Generator) -> None:
    """Queries by what a token is; keys by the same, or by what the token before is."""
    nope, half = config.qk_nope_head_dim, config.kv_lora_rank // 2
    queries, keys = _by_head(masters, f"{at}.q_b_proj", config), _by_head(masters, f"{at}.kv_b_proj", config)
    for head in range(config.num_attention_heads):
        kind = head % KINDS
        if kind > 1:
            continue
        seen = MATCH / half**0.5 * torch.randn(nope, half, generator=generator)
        queries[head, :nope], keys[head, :nope] = 0, 0
        queries[head, :nope, :half] = seen
        keys[head, :nope, half * kind : half * (kind + 1)] = seen


def _look_back(masters: dict[str, Tensor], config: ModelConfig, common: Tensor) -> None:
    """The same key for every token, and the same query turned back by one position, in the first layer."""
    at, wide, rank = "layers.0.self_attn", config.qk_rope_head_dim, config.kv_lora_rank
    pairs = torch.zeros(wide // 2)
    pairs[:3] = torch.tensor([1.0, 0.5, 0.5]) ** 0.5  # the slower ones tell apart what lies a whole turn away
    cos, sin = (part[0] for part in Rope(config, torch.device("cpu")).table(torch.tensor([1])))
    one, other = (slice(0, None, 2), slice(1, None, 2)) if config.rope_interleave else _halves(wide)
    still, back = torch.zeros(wide), torch.zeros(wide)
    still[one] = pairs
    back[one], back[other] = pairs * cos, -pairs * sin
    hidden = config.hidden_size
    seen = COMMON * (hidden / (COMMON**2 + SPREAD**2 * hidden)) ** 0.5  # of `common`, after the norm
    size = (LOOK / config.softmax_scale) ** 0.5
    masters[f"{at}.kv_a_proj_with_mqa.weight"][rank:] = size / seen * still[:, None] * common
    masters[f"{at}.q_a_proj.weight"][-1] = common / 2
    for queries in _by_head(masters, f"{at}.q_b_proj", config)[-2:]:
        queries[:] = 0
        queries[config.qk_nope_head_dim :, -1] = size / (seen / 2) * back


def _tell(masters: dict[str, Tensor], config: ModelConfig, before: Tensor) -> None:
    """What the last two heads of the first layer attend to, the half of its latent that says what it is, goes to where
    `before` [half, hidden] reads."""
    wide, half = config.v_head_dim, len(before)
    values = _by_head(masters, "layers.0.self_attn.kv_b_proj", config)[-2:, config.qk_nope_head_dim :]
    out = masters["layers.0.self_attn.o_proj.weight"].view(config.hidden_size, -1, wide)[:, -2:]
    values[:], out[:] = 0, 0
    for index in range(min(half, 2 * wide)):
        head, element = divmod(index, wide)
        values[head, element, index] = 1
        out[:, head, element] = SPREAD * before[index]


def _by_head(masters: dict[str, Tensor], name: str, config: ModelConfig) -> Tensor:
    """A view of a projection, [heads, outputs, inputs]."""
    weight = masters[f"{name}.weight"]
    return weight.view(config.num_attention_heads, -1, weight.shape[1])


def _halves(wide: int) -> tuple[slice, slice]:
    return slice(0, wide // 2), slice(wide // 2, None)
