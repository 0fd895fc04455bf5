"""How many bytes each part of a model takes once loaded, from its configuration alone."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from hybrid.config import ModelConfig
from hybrid.errors import UsageError
from hybrid.memory import kv_format
from quant import LADDER, int4_g32, int8_g32, trellis
from quant.aligned import PAGE
from quant.gemm import FP32, PIECE, buffer_bytes

MIB, GIB = 1 << 20, 1 << 30
RESIDENT_BITS = {"fp32": 32.0, "bf16": 16.0, "int8": int8_g32.BITS_PER_WEIGHT, "int4": int4_g32.BITS_PER_WEIGHT}
GROUP = 32  # weights per scale of a resident matrix; others stay bf16

# The program itself, measured on Linux: the process with torch and the kernels loaded and warm, without weights.
PROGRAM = 560 * MIB
# Assumed until a card was at hand: what CUDA adds to the process, its context on the card, and what a display keeps.
CUDA_IN_RAM, CUDA_CONTEXT, DISPLAY_SHARE = 2 * GIB, 640 * MIB, 1 / 50
CUBLAS = 128 * MIB
SYSTEM, SYSTEM_SHARE = 3 * GIB, 3 / 100  # left to the system: its programs, page tables, what RAM is reported short
PAGE_CACHE = GIB  # what reading a drive past the cache still leaves in it
SPARE = 16  # of the memory that is free for a running program, one part in so many is left where experts fill it
ATTENTION_TILE, EXPERT_GROUP, STAGED_EXPERTS = 1024, 16, 32  # of a prefill chunk on a GPU: tokens, experts, experts
CPU_CHUNK = 256  # tokens


class Mix(NamedTuple):
    """Formats of all routed experts: how many experts have each pair (of gate_up, of down)."""

    counts: Mapping[tuple[str, str], int]

    def bytes(self, config: ModelConfig) -> int:
        """Of all experts, as they lie in memory."""
        return sum(count * blob_bytes(config, pair) for pair, count in self.counts.items())

    def largest(self, config: ModelConfig) -> int:
        """Bytes of the largest expert, which a slot must hold."""
        return max((blob_bytes(config, pair) for pair in self.counts), default=0)

    def least(self, config: ModelConfig, count: int) -> int:
        """Bytes of the `count` smallest experts: what any so many of them take at least."""
        size = 0
        for each, number in sorted((blob_bytes(config, pair), number) for pair, number in self.counts.items()):
            size += each * min(number, count)
            count -= min(number, count)
        return size

    def bits(self, config: ModelConfig) -> float:
        """Per weight, scales and padding included; 0 for a model without routed experts."""
        return 8 * self.bytes(config) / config.routed_params if config.routed_params else 0.0

    def names(self) -> dict[str, int]:
        """Experts by format, spelt "trellis2" or "trellis1_5+trellis2" for gate_up and down."""
        return {a if a == b else f"{a}+{b}": count for (a, b), count in self.counts.items()}


def uniform(config: ModelConfig, format: str) -> Mix:
    """All experts in one format."""
    return Mix({(format, format): config.num_experts} if config.num_experts else {})


def native(config: ModelConfig) -> Mix:
    """Experts as a released model's are kept: INT4 without loss, anything else as bf16."""
    return uniform(config, "int4_g32" if config.quant_method == "compressed-tensors" else "bf16")


def of_bits(config: ModelConfig, bits: float) -> Mix:
    """At most `bits` per weight, from two neighbours of the ladder. Raises UsageError below its lowest step.

    `kimi-local quantize --bits` spends the same bytes matrix by matrix, where they help most.
    """
    budget = bits * config.routed_params / 8 + PAGE  # bits as they are printed are rounded
    steps = [(name, blob_bytes(config, (name, name))) for name in LADDER]
    affordable = [index for index, (_, size) in enumerate(steps) if size * config.num_experts <= budget]
    if not affordable:
        least = uniform(config, LADDER[0]).bits(config)
        raise UsageError(f"{bits:g} bits per weight are too few.", f"The fewest are {math.ceil(100 * least) / 100:g}.")
    (low, size), above = steps[affordable[-1]], steps[affordable[-1] + 1 : affordable[-1] + 2]
    if not above:
        return uniform(config, low)
    high, larger = above[0]
    upgraded = int((budget - size * config.num_experts) / (larger - size))
    counts = {(low, low): config.num_experts - upgraded, (high, high): upgraded}
    return Mix({pair: count for pair, count in counts.items() if count})


def blob_bytes(config: ModelConfig, formats: tuple[str, str]) -> int:
    """Bytes of one routed expert with these formats of gate_up and down; those of packs start on pages."""
    if formats[0] == "bf16":
        return 2 * config.expert_params
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    gate_up, down = (2 * intermediate, hidden), (hidden, intermediate)
    size = _matrix_bytes(formats[0], *gate_up) + _matrix_bytes(formats[1], *down)
    return size if formats[0] == "int4_g32" else -(-size // PAGE) * PAGE


def _matrix_bytes(format: str, rows: int, columns: int) -> int:
    if format == "int4_g32":
        return rows // int4_g32.ROWS * -(-columns // int4_g32.COLUMNS) * 2 * int4_g32.HALF
    return trellis.matrix_bytes(format, rows, columns)


class Resident(NamedTuple):
    """Bytes and weights of what every token reads. `per_layer` parts are those of one layer."""

    attention: tuple[int, int]  # per layer; (bytes, weights)
    shared: tuple[int, int]  # per MoE layer, with its router
    dense: tuple[int, int]  # per dense layer
    head: tuple[int, int]
    norms: int  # bytes of all norms and router biases
    embedding: int  # bytes, on the host

    def parts(self, config: ModelConfig) -> dict[str, int]:
        """Bytes by name over all layers, embedding not counted."""
        moe = config.num_moe_layers
        parts = {
            "attention": self.attention[0] * config.num_hidden_layers,
            "shared experts and routers": self.shared[0] * moe,
            "dense layers": self.dense[0] * (config.num_hidden_layers - moe),
            "head": self.head[0],
            "norms": self.norms,
        }
        return {name: size for name, size in parts.items() if size}


def resident(config: ModelConfig, choice: str) -> Resident:
    """What the matrices every token reads take, as `choice` (a key of RESIDENT_BITS) keeps them.

    With int8 or int4 the router stays fp32, kv_b_proj and norms bf16, and the head has 8 bits.
    """
    plain = 4 if choice == "fp32" else 2  # bytes of a weight that is not packed
    hidden, heads = config.hidden_size, config.num_attention_heads
    absorbed = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention = config.attention_params
    attention_bytes = _coded(attention - absorbed, choice) + plain * absorbed
    shared, router = 3 * hidden * config.shared_intermediate_size, hidden * config.n_routed_experts
    dense, table = 3 * hidden * config.intermediate_size, config.vocab_size * hidden
    head = 0 if config.tie_word_embeddings else _coded(table, "int8" if choice == "int4" else choice)
    ranks = config.kv_lora_rank + (config.q_lora_rank or 0)
    norms = plain * (config.num_hidden_layers * (2 * hidden + ranks) + hidden)
    return Resident(
        (attention_bytes, attention),
        (_coded(shared, choice) + 4 * router, shared + router),
        (_coded(dense, choice), dense),
        (head, table),
        norms + 4 * config.n_routed_experts * config.num_moe_layers,
        plain * table,
    )


def _coded(weights: int, choice: str) -> int:
    return int(weights * RESIDENT_BITS[choice] / 8)


def kv_bytes(config: ModelConfig, ctx: int, batch: int, kv: str) -> int:
    """Latent rows, kept as `kv`, of `batch` sequences of `ctx` tokens each."""
    return batch * kv_format.kv_bytes(config, ctx, kv)


def decoded_bytes(config: ModelConfig, ctx: int, kv: str, choice: str, *, on_gpu: bool) -> dict[str, int]:
    """One sequence's rows of a layer as attention reads them, where they are kept as codes; nothing where they are not.

    `choice` is that of `resident`. A card decodes by its own kernel but for chunks of prompts, and then through fp32.
    """
    if kv not in kv_format.REDUCED:
        return {}
    plain = 4 if choice == "fp32" else 2
    return {"decoded rows": ctx * (plain * config.latent_dim + (4 + plain) * config.kv_lora_rank * on_gpu)}


def gpu_prefill_bytes(config: ModelConfig, chunk: int, largest: int) -> dict[str, int]:
    """Of the device during a chunk of `chunk` tokens: its activations, and the experts streamed through.

    Hidden states are kept for the whole chunk; attention goes by tiles of tokens, experts by groups.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    kept = chunk * (8 * hidden + 8 * config.n_routed_experts)  # residual, normed, fp32 sum; scores and choices
    per_token = heads * (2 * config.qk_head_dim + 2 * config.latent_dim + 6 * config.kv_lora_rank)
    attention = min(chunk, ATTENTION_TILE) * per_token
    group = min(EXPERT_GROUP, config.n_routed_experts)
    rows = chunk * config.num_experts_per_tok * group // max(1, config.n_routed_experts)
    inner = rows * (6 * hidden + 6 * config.moe_intermediate_size)
    staged = 2 * min(STAGED_EXPERTS, config.n_routed_experts) * largest + 2 * 2 * config.expert_params
    return {"prefill activations": kept + max(attention, inner), "prefill staging": staged}


def cpu_prefill_bytes(config: ModelConfig, chunk: int) -> int:
    """Activations of a chunk on a CPU, and the piece of an expert that is decoded where one has many of its tokens."""
    hidden, intermediate, heads = config.hidden_size, config.moe_intermediate_size, config.num_attention_heads
    width = config.qk_head_dim + config.latent_dim + config.kv_lora_rank  # queries and their latents
    per_token = 16 * hidden + 4 * heads * width
    if not config.num_experts:
        return chunk * per_token
    kernels = config.num_experts_per_tok * (5 * intermediate + 4 * hidden)  # fp32 and int8 rows of experts
    gemm = 4 * hidden + 8 * intermediate + 4 * min(PIECE, max(2 * intermediate, hidden))  # of one, in fp32
    return chunk * (per_token + max(kernels, gemm)) + buffer_bytes(hidden, intermediate, FP32)


def decode_bytes(config: ModelConfig, batch: int) -> int:
    """Buffers of decode steps: logits twice, and rows."""
    return batch * (8 * config.vocab_size + 64 * config.hidden_size)
