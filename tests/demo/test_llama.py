"""The source's forward pass against transformers, and the folded and rotated layers against the plain ones."""

import pytest
import torch
import transformers

from hybrid.demo.llama import LlamaLayer, activations, attention, logits, rms_norm
from hybrid.demo.rotation import hartley, rotate_layer
from tests.demo.random_llama import RandomLlama

NAMES = {
    "input_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "post_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def transformers_llama(model: RandomLlama) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=len(model.tokens),
        hidden_size=model.config.hidden_size,
        num_hidden_layers=model.config.num_hidden_layers,
        num_attention_heads=model.config.num_attention_heads,
        num_key_value_heads=model.config.num_key_value_heads,
        intermediate_size=model.config.intermediate_size,
        rope_parameters={"rope_type": "default", "rope_theta": model.config.rope_theta},
        rms_norm_eps=model.config.rms_norm_eps,
        tie_word_embeddings=True,
    )
    state = {"model.embed_tokens.weight": model.embedding(), "model.norm.weight": model.final_norm()}
    for i, layer in enumerate(model.layers):
        for field, name in NAMES.items():
            state[f"model.layers.{i}.{name}.weight"] = half_split(layer, field, model.config.head_dim)
    oracle = transformers.LlamaForCausalLM(config).float().eval()
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    oracle.tie_weights()
    return oracle


def half_split(layer: LlamaLayer, field: str, head_dim: int) -> torch.Tensor:
    """transformers keeps the first elements of all pairs in the first half of a head, the second in the other."""
    tensor = getattr(layer, field)
    if field not in "qk":
        return tensor
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def test_logits_equal_transformers() -> None:
    model = RandomLlama()
    ids = torch.randint(0, len(model.tokens), (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = transformers_llama(model)(input_ids=ids).logits
    found = logits(model, ids)
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("size", [7, 96, 576])
def test_hartley_is_orthogonal_and_spreads(size: int) -> None:
    q = hartley(size)
    assert torch.allclose(q @ q.T, torch.eye(size), atol=1e-5)
    assert q.abs().max() <= (2 / size) ** 0.5 + 1e-6


def test_rotated_layer_is_the_same_function() -> None:
    model = RandomLlama()
    config, layer = model.config, model.layer(0)
    q = hartley(config.hidden_size)
    rotated = rotate_layer(layer, q)
    h = torch.randn(1, 20, config.hidden_size, generator=torch.Generator().manual_seed(1))

    def block(layer: LlamaLayer, h: torch.Tensor) -> torch.Tensor:
        h = h + attention(config, layer, rms_norm(h, layer.input_norm, config.rms_norm_eps))
        return h + activations(layer, rms_norm(h, layer.post_norm, config.rms_norm_eps)) @ layer.down.T

    assert torch.allclose(block(rotated, h @ q), block(layer, h) @ q, atol=1e-4)
    assert rotated.input_norm.eq(1).all() and rotated.post_norm.eq(1).all()
