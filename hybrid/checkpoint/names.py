"""Tensor names: every spelling on disk becomes one.

Released and re-exported checkpoints put the text model under `language_model.model.`, `language_model.`, `model.` or
`model.language_model.`; the rest of the program sees `layers.3.mlp.gate.weight`, `embed_tokens.weight`,
`lm_head.weight`, `vision_tower.…` and `mm_projector.…`.
"""

import re

_PREFIX = re.compile(r"^(?:model\.|language_model\.)+")


def normalise(name: str) -> str | None:
    """The name without its tower prefix, or None for a tensor nobody needs (old rotary frequency tables)."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    return _PREFIX.sub("", name)


def expert_prefix(layer: int, expert: int) -> str:
    """Where routed expert `expert` of `layer` lives; its projections are gate_proj, up_proj and down_proj."""
    return f"layers.{layer}.mlp.experts.{expert}"


def layer_of(name: str) -> int | None:
    """The layer a normalised name belongs to; None for tables, the final norm and the image tower."""
    layer = name.split(".", 2)[1] if name.startswith("layers.") else ""
    return int(layer) if layer.isdecimal() else None


def is_vision(name: str) -> bool:
    """Whether a normalised name belongs to the image tower or its projector."""
    return name.startswith(("vision_tower.", "mm_projector."))
