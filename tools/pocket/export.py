"""From a trained state to a model directory as Moonshot releases one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from hybrid.chat.template import DEFAULT_TEMPLATE
from hybrid.chat.tokenizer import CONFIG_FILE, MODEL_FILE
from hybrid.checkpoint.names import expert_prefix
from hybrid.checkpoint.write import CheckpointWriter
from hybrid.errors import KimiError
from pocket.config import released_config
from pocket.model import DOWN, GATE_UP
from pocket.qat import codes_and_scales, is_expert, kept_bits
from pocket.sources import SOURCES_FILE
from pocket.state import Settings, State


def export(settings: Settings, state: State, data: Path, directory: Path, *, experts: str | None = None) -> Path:
    """Write the model to `directory`, with the tokenizer found in `data`; returns it.

    `experts` "int4", "int3" and "int2" round them to so many bits, all kept as INT4; "bf16" does not; None means what
    training multiplied in its last phase. Raises CheckpointError if the directory is in use and KimiError if there is
    no tokenizer.
    """
    bits = kept_bits(experts) if experts else settings.qat_bits
    raw = released_config(settings.model, experts="int4" if bits else "bf16")
    with CheckpointWriter(directory) as writer:
        for name, master in state.masters.items():
            if is_expert(name):
                _add_experts(writer, name, master, bits)
            else:
                writer.add(name, master.bfloat16())
        for layer, bias in state.bias.items():
            writer.add(f"layers.{layer}.mlp.gate.e_score_correction_bias", bias)
        return writer.finish({**_texts(raw), **_tokenizer(data)})


def _add_experts(writer: CheckpointWriter, name: str, master: Tensor, bits: int | None) -> None:
    for linear, weight in matrices(name, master):
        if bits:
            codes, scales = codes_and_scales(weight, bits)
            writer.add_int4(linear, codes.numpy(), scales)
        else:
            writer.add(f"{linear}.weight", weight.bfloat16())


def matrices(name: str, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each expert's own matrices with the names they have in a checkpoint, from a stack of them."""
    layer = int(name.split(".")[1])
    for expert, weight in enumerate(stacked):
        at = expert_prefix(layer, expert)
        if name.endswith(GATE_UP):
            yield from ((f"{at}.gate_proj", weight[0]), (f"{at}.up_proj", weight[1]))
        else:
            assert name.endswith(DOWN)
            yield f"{at}.down_proj", weight


def _texts(raw: dict[str, Any]) -> dict[str, str]:
    text = raw["text_config"]
    im_end = text["bos_token_id"] + 2
    generation = {"max_length": text["max_position_embeddings"], "eos_token_id": im_end, "do_sample": False}
    return {
        "config.json": json.dumps(raw, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "chat_template.jinja": DEFAULT_TEMPLATE,
    }


def _tokenizer(data: Path) -> dict[str, bytes]:
    """Its files, and the list of what the model was trained on where there is one."""
    try:
        files = {name: (data / name).read_bytes() for name in (MODEL_FILE, CONFIG_FILE)}
    except FileNotFoundError as error:
        raise KimiError(f"{data} holds no tokenizer.", "Run: python tools/train_pocket.py prepare DATA") from error
    sources = data / SOURCES_FILE
    return files | ({SOURCES_FILE: sources.read_bytes()} if sources.exists() else {})
