"""A Llama model rewritten as a Kimi K2.5 checkpoint, layer by layer, in one pass and about a gigabyte of memory.

A text that ships with this module flows through the original layers at the same time: its statistics choose the shared
experts' neurons, the router's thresholds, the rope slots, and how the routed experts are rounded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hybrid.chat.tokenizer import KIMI_SPECIALS, Tokenizer, write_tokenizer
from hybrid.checkpoint.write import CheckpointWriter
from hybrid.demo import experts as moe
from hybrid.demo import int4
from hybrid.demo.files import text_files
from hybrid.demo.llama import Llama, LlamaConfig, LlamaLayer, activations, attention, rms_norm
from hybrid.demo.mla import mla_weights, pair_energy
from hybrid.demo.rotation import hartley, rotate_layer
from hybrid.demo.vocabulary import Vocabulary, convert_vocabulary

OnProgress = Callable[[int, int, str], None]
ExpertFormat = Literal["int4", "bf16"]

CALIBRATION = Path(__file__).with_name("calibration.txt")
SEQUENCE = 256  # tokens of calibration text that see each other
SHARD_BYTES = 128 << 20


def convert(
    source: Llama,
    tokens: list[str],
    directory: Path,
    *,
    experts: ExpertFormat = "int4",
    on_progress: OnProgress = lambda done, total, text: None,
) -> Path:
    """Write `source`, whose vocabulary is `tokens`, to `directory` and return it.

    The directory appears complete or not at all. Raises CheckpointError if it exists.
    """
    config, vocabulary = source.config, convert_vocabulary(tokens)
    layers = config.num_hidden_layers
    q = hartley(config.hidden_size)
    with torch.no_grad(), CheckpointWriter(directory, max_shard_bytes=SHARD_BYTES) as writer:
        embedding = vocabulary.embedding(source.embedding() @ q)
        h = embedding[calibration_ids(vocabulary)]
        for i in range(layers):
            on_progress(i, layers + 1, f"layer {i + 1} of {layers}")
            h = _convert_layer(writer, config, i, rotate_layer(source.layer(i), q), h, experts)
        on_progress(layers, layers + 1, "writing")
        _add(writer, "", {"embed_tokens.weight": embedding, "norm.weight": torch.ones(config.hidden_size)})
        _add(writer, "", {"lm_head.weight": vocabulary.head((source.embedding() * source.final_norm()) @ q)})
        write_tokenizer(writer.staging, vocabulary.ranks)
        finished = writer.finish(text_files(config, len(vocabulary.ranks), experts))
    on_progress(layers + 1, layers + 1, "done")
    return finished


def calibration_ids(vocabulary: Vocabulary) -> Tensor:
    """int64 [sequences, SEQUENCE]: the built-in text, prose and conversations in Kimi's framing."""
    count = len(vocabulary.ranks)
    tokenizer = Tokenizer(vocabulary.ranks, {count + offset: name for offset, name in KIMI_SPECIALS.items()})
    ids = torch.tensor(tokenizer.encode_prompt(CALIBRATION.read_text(encoding="utf-8")))
    return ids[: len(ids) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)


def _convert_layer(
    writer: CheckpointWriter, config: LlamaConfig, i: int, layer: LlamaLayer, h: Tensor, experts: ExpertFormat
) -> Tensor:
    """Write block i, whose norms are folded, and return its output for the calibration inputs h."""
    prefix, ones = f"layers.{i}.", torch.ones(config.hidden_size)
    _add(writer, prefix, {"input_layernorm.weight": ones, "post_attention_layernorm.weight": ones})
    x = rms_norm(h, layer.input_norm, config.rms_norm_eps)
    energy = pair_energy(config, layer, x.flatten(0, 1))
    _add(writer, f"{prefix}self_attn.", mla_weights(config, layer, energy))
    h = h + attention(config, layer, x)
    x = rms_norm(h, layer.post_norm, config.rms_norm_eps)
    a = activations(layer, x)
    if i == 0:
        _add_mlp(writer, f"{prefix}mlp.", layer)
    else:
        _add_moe(writer, f"{prefix}mlp.", i, layer, x.flatten(0, 1), a.flatten(0, 1), experts)
    return h + a @ layer.down.T


def _add_moe(
    writer: CheckpointWriter, prefix: str, seed: int, layer: LlamaLayer, x: Tensor, a: Tensor, experts: ExpertFormat
) -> None:
    split = moe.split_neurons(moe.neuron_energy(layer, a), seed)
    weight, bias = moe.router_weights(x)
    writer.add(f"{prefix}gate.weight", weight)
    writer.add(f"{prefix}gate.e_score_correction_bias", bias)
    _add_mlp(writer, f"{prefix}shared_experts.", moe.neurons(layer, split.shared))
    if experts == "bf16":
        for e, chosen in enumerate(split.experts):
            _add_mlp(writer, f"{prefix}experts.{e}.", moe.neurons(layer, chosen))
    else:
        with _one_thread():
            quantized = quantize_experts(layer, split.experts, x, a)
        for name, (codes, scales) in quantized.items():
            writer.add_int4(f"{prefix}experts.{name}", codes.numpy(), scales)


def quantize_experts(layer: LlamaLayer, chosen: Tensor, x: Tensor, a: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """INT4 codes and scales by name ("3.gate_proj") of experts with the neurons chosen [experts, width], two by two
    the same ones. x [tokens, hidden] and a [tokens, intermediate] are inputs and activations of the dense layer."""
    neurons = chosen[::2].flatten()
    # A row of gate or up is a neuron: its codes do not depend on the order, so twins share them.
    rows = torch.cat((layer.gate[neurons], layer.up[neurons]))
    codes, scales = (t[0] for t in int4.quantize(rows[None], (x.T @ x / len(x))[None]))
    row = torch.empty(layer.gate.shape[0], dtype=torch.int64)
    row[neurons] = torch.arange(len(neurons))
    down = layer.down[:, chosen].transpose(0, 1)
    inputs = a[:, chosen].transpose(0, 1)
    down_codes, down_scales = int4.quantize(down, inputs.transpose(1, 2) @ inputs / len(a))
    result = {}
    for e, at in enumerate(row[chosen]):
        result[f"{e}.gate_proj"] = codes[at], scales[at]
        result[f"{e}.up_proj"] = codes[at + len(neurons)], scales[at + len(neurons)]
        result[f"{e}.down_proj"] = down_codes[e], down_scales[e]
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """For thousands of operations too small to share: threads that wait for each other cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _add_mlp(writer: CheckpointWriter, prefix: str, layer: LlamaLayer) -> None:
    names = {"gate_proj.weight": layer.gate, "up_proj.weight": layer.up, "down_proj.weight": layer.down}
    _add(writer, prefix, names)


def _add(writer: CheckpointWriter, prefix: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        writer.add(prefix + name, tensor.bfloat16())
