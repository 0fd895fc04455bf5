"""What the tensors of a model say of its resident matrices: in what they are kept, and what they take once loaded."""

from collections import Counter
from collections.abc import Collection, Iterator

from hybrid.checkpoint.expected import Linear, layer_linears
from hybrid.checkpoint.hf import is_absorbed
from hybrid.config import ModelConfig
from hybrid.memory import parts
from hybrid.memory.parts import RESIDENT_BITS, Resident

CODED = {"weight_packed": "int4", "weight_int8": "int8"}


def as_stored(config: ModelConfig, names: Collection[str]) -> tuple[str, Resident] | None:
    """What most resident weights are kept in ("bf16", "int8" or "int4") and the bytes of all of them, where our own
    kernels read them; None if all are plain. `names` are the normalised ones of all tensors.

    Matrices may be of several kinds: a release often leaves its head, and sometimes attention, as it was trained.
    """
    weights: Counter[str] = Counter()
    saved: Counter[str] = Counter()
    for part, linear in _linears(config):
        size = linear.out_features * linear.in_features
        kind = next((kind for suffix, kind in CODED.items() if f"{linear.prefix}.{suffix}" in names), "bf16")
        weights[kind] += size
        saved[part] += int(size * (RESIDENT_BITS["bf16"] - RESIDENT_BITS[kind]) / 8)
    if not any(saved.values()):
        return None
    plain, layers, moe = parts.resident(config, "bf16"), config.num_hidden_layers, config.num_moe_layers

    def less(part: str, layers: int) -> tuple[int, int]:
        size, count = getattr(plain, part)
        return size - saved[part] // max(1, layers), count

    found = plain._replace(
        attention=less("attention", layers),
        shared=less("shared", moe),
        dense=less("dense", layers - moe),
        head=less("head", 1),
    )
    return weights.most_common(1)[0][0], found


def _linears(config: ModelConfig) -> Iterator[tuple[str, Linear]]:
    """Every resident matrix that may be kept as codes, with its part of `Resident`."""
    for layer in range(config.num_hidden_layers):
        for linear in layer_linears(config, layer):
            if ".mlp.experts." in linear.prefix:
                break  # they come last, and are many
            if not is_absorbed(f"{linear.prefix}."):
                inside = "shared" if config.is_moe_layer(layer) else "dense"
                yield "attention" if ".self_attn." in linear.prefix else inside, linear
    if not config.tie_word_embeddings:
        yield "head", Linear("lm_head", config.vocab_size, config.hidden_size)
