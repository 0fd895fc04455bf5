"""transformers' own classes holding the same weights as a checkpoint, and prompts on which two right programs agree.

`transformers_model` loads a checkpoint's tensors, dequantized to float32, into the native DeepSeek V2, V3 or Kimi K2.5
class; nothing is fetched. Where these deviate from the makers' own code they are set right, with the reason.
"""

import copy
import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hybrid.config import ModelConfig
from tests.model.random_checkpoint import Case, text_of
from tests.reference import Reference, dequantize, read_tensors, yarn_mscale

# Two right programs in float32 may route differently where scores lie closer than this (relative): such prompts prove
# nothing and are drawn again. Rounding moves a score by about 1e-6.
ROUTER_GAP = 1e-5
# The same for the next token: its lead over the second, relative to the largest logit.
LEAD = 1e-4
IMAGES = ("vision_tower.", "mm_projector.")


def read_case(directory: Path) -> Case:
    """The checkpoint of any directory, read by plain json and safetensors."""
    raw = json.loads((directory / "config.json").read_text())
    return Case(directory, raw, ModelConfig.from_dict(raw), read_tensors(directory))


def settled_tokens(case: Case, seed: int, length: int) -> tuple[list[int], Tensor]:
    """Random ids whose routing nowhere hangs on rounding, with the reference's float64 logits [length, vocab]."""
    rng = random.Random(seed)
    while True:
        ids = [rng.randrange(case.config.vocab_size) for _ in range(length)]
        reference = Reference(case.config, case.tensors)
        logits = reference.logits(ids)
        if min(reference.gaps, default=1.0) > ROUTER_GAP:
            return ids, logits


def transformers_config(raw: dict[str, Any]) -> Any:
    """The native configuration object; only what its class would misread is spelled differently."""
    raw = copy.deepcopy(raw)
    text = text_of(raw)
    text.pop("quantization_config", None)  # the weights arrive dequantized
    text["model_type"] = text["model_type"].replace("kimi_k2", "deepseek_v3")  # same class, Moonshot's name for it
    text["num_key_value_heads"] = text["num_attention_heads"]  # what it is worth in MLA, if the file leaves it out
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if rope and "factor" in rope:
        # Without both mscales transformers falls back to mscale 1; DeepSeek reads what is there (absent: 1 and 0).
        rope["attention_factor"] = yarn_mscale(rope["factor"], rope.get("mscale", 1.0)) / yarn_mscale(
            rope["factor"], rope.get("mscale_all_dim", 0.0)
        )
    chosen: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    if "text_config" not in raw:
        v2 = text["model_type"] == "deepseek_v2"
        return (transformers.DeepseekV2Config if v2 else transformers.DeepseekV3Config)(**text | chosen)
    tiny: dict[str, Any] = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    vision = transformers.models.kimi_k25.configuration_kimi_k25.Kimi_K25VisionConfig(**tiny)
    return transformers.Kimi_K25Config(
        text_config=text,
        vision_config=vision,
        projection_hidden_size=tiny["hidden_size"],
        tie_word_embeddings=text.get("tie_word_embeddings", False),
        **chosen,
    )


def transformers_model(case: Case) -> nn.Module:
    """transformers' native class for `case` in float32, eager attention, weights dequantized from the same tensors."""
    config = transformers_config(case.raw)
    architecture = {
        "deepseek_v2": transformers.DeepseekV2ForCausalLM,
        "deepseek_v3": transformers.DeepseekV3ForCausalLM,
        "kimi_k25": transformers.Kimi_K25ForConditionalGeneration,
    }[config.model_type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # no shared experts
        model = architecture(config).float().eval()
    prefix = "model.language_model." if config.model_type == "kimi_k25" else "model."
    state = transformers_state(case)
    state = {name if name.startswith("lm_head.") else prefix + name: tensor for name, tensor in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    absent = IMAGES if case.config.n_shared_experts else (*IMAGES, "shared_experts.")
    assert not unexpected and all(any(part in name for part in absent) for name in missing), (missing, unexpected)
    for name, module in model.named_modules():
        # transformers, like DeepSeek's own code, leaves these two norms at the class's 1e-6 and ignores rms_norm_eps.
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.variance_epsilon = case.config.rms_norm_eps
    return model


def transformers_state(case: Case) -> dict[str, Tensor]:
    """Parameters in transformers' layout, float32: experts stacked as gate_up_proj [E, 2I, H], down_proj [E, H, I]."""
    config, tensors = case.config, case.tensors

    def matrix(name: str) -> Tensor:
        block = config.weight_block_size or (128, 128)
        return dequantize(tensors, name, torch.float32, config.group_size, block)

    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if (
            ".experts." in name
            or name.startswith(IMAGES)
            or kind in ("weight_scale", "weight_scale_inv", "weight_shape")
        ):
            continue
        if kind in ("weight", "weight_packed"):
            state[f"{prefix}.weight"] = matrix(prefix)
        else:
            state[name] = tensor.float()
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    for layer in config.moe_layers:
        name = f"layers.{layer}.mlp.experts"
        names = [f"{name}.{i}" for i in range(config.n_routed_experts)]
        state[f"{name}.gate_up_proj"] = torch.stack(
            [torch.cat([matrix(f"{expert}.gate_proj"), matrix(f"{expert}.up_proj")]) for expert in names]
        )
        state[f"{name}.down_proj"] = torch.stack([matrix(f"{expert}.down_proj") for expert in names])
    return state


@torch.inference_mode()
def transformers_logits(model: nn.Module, token_ids: Sequence[int]) -> Tensor:
    """[T] ids -> float32 [T, vocab]."""
    return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]


@torch.inference_mode()
def transformers_greedy(model: nn.Module, token_ids: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """`count` ids, always the likeliest, with each one's lead over the second in units of the logits' largest size."""
    ids: list[int] = []
    leads: list[float] = []
    fed, cache = torch.tensor([token_ids]), None
    while len(ids) < count:
        out = model(input_ids=fed, past_key_values=cache, use_cache=True)
        (first, second), best = (x.tolist() for x in out.logits[0, -1].topk(2))
        ids.append(best[0])
        leads.append((first - second) / float(out.logits[0, -1].abs().max()))
        fed, cache = torch.tensor([best[:1]]), out.past_key_values
    return ids, leads


def settled_answer(
    case: Case, model: nn.Module, seed: int, prompt: int, answer: int
) -> tuple[list[int], list[int], Tensor]:
    """A random prompt, the greedy answer to it, and the reference's logits of both, [prompt + answer, vocab].

    Neither a token nor an expert hangs on rounding: transformers and the reference alone see to that. Nearly tied
    prompts are drawn again; ten in a row would mean that the weights decide nothing.
    """
    rng = random.Random(seed)
    for _ in range(10):
        question = [rng.randrange(case.config.vocab_size) for _ in range(prompt)]
        reply, leads = transformers_greedy(model, question, answer)
        reference = Reference(case.config, case.tensors)
        logits = reference.logits(question + reply)
        if min(leads) > LEAD and min(reference.gaps, default=1.0) > ROUTER_GAP:
            return question, reply, logits
    raise AssertionError("ten prompts in a row were nearly tied somewhere")
