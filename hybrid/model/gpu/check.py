"""Before a card is used, its kernels must compute what decoded weights give; small cases, a second or two in all."""

from collections.abc import Callable

import numpy as np
import torch

from hybrid.memory.kv_codec import decode as unpack
from hybrid.memory.kv_codec import encode
from hybrid.memory.kv_format import KVFormat
from hybrid.model.batch import Seen
from hybrid.model.gpu import Card, first_line
from hybrid.model.gpu.attention import decode
from hybrid.model.gpu.experts import int4_experts, trellis_experts
from hybrid.model.gpu.linear import multiply
from hybrid.model.gpu.matrix import upload
from quant import int4_g32, kernels, linear, trellis, trellis_moe
from quant.rotation import rotate, signs
from quant.scales import to_bits
from quant.swiglu import swiglu

CLOSE = 2e-3  # relative error of a whole result; fp16 activations leave some 3e-4
Experts = list[tuple[np.ndarray, np.ndarray]]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative error of a whole array; NaN if there is any."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def moe_by_decoded(
    experts: Experts, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, sign: tuple[np.ndarray, ...] | None
) -> np.ndarray:
    """The layer from decoded matrices (gate_up as `kernels.interleave` leaves it, down), in the basis of `sign`."""
    y = np.zeros_like(x)
    for token, row in enumerate(x):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            gate_up, down = experts[expert]
            both = (gate_up @ (rotate(row, sign[0]) if sign else row)).reshape(-1, 2, 16)
            inner = swiglu(both[:, 0].reshape(-1), both[:, 1].reshape(-1))
            y[token] += weight * (down @ (rotate(inner, sign[1]) if sign else inner))
    return y


def random_trellis(name: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a matrix: random bits, scales as a trained model's."""
    blob = rng.integers(0, 256, trellis.matrix_bytes(name, rows, columns), np.uint8)
    for plane in trellis.planes(name, blob, trellis.layout(rows, columns)):
        plane.scales[:] = to_bits(rng.uniform(1e-3, 4e-3, plane.scales.shape).astype(np.float32))
    return blob


def random_choice(
    tokens: int, hidden: int, experts: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [tokens, hidden], and two experts with their weights for each."""
    ids = np.stack([rng.choice(experts, 2, replace=False) for _ in range(tokens)])
    return rng.standard_normal((tokens, hidden), np.float32), ids, rng.random((tokens, 2), np.float32)


def trellis_error(
    card: Card, formats: list[tuple[str, str]], hidden: int, intermediate: int, tokens: int, seed: int = 0
) -> float:
    """Of a layer whose expert i has formats[i] for gate_up and down."""
    rng = np.random.default_rng(seed)
    shapes = (2 * intermediate, hidden), (hidden, intermediate)
    blobs = [[random_trellis(name, *shape, rng) for name, shape in zip(pair, shapes, strict=True)] for pair in formats]
    sizes = [sum(len(part) for part in pair) for pair in blobs]
    sign = signs(1, 2, "gate_up", hidden), signs(1, 2, "down", intermediate)
    data = np.concatenate([part for pair in blobs for part in pair])
    layer = trellis_moe.experts(data, np.cumsum([0, *sizes[:-1]]), formats, sign)
    x, ids, weights = random_choice(tokens, hidden, len(formats), rng)
    decoded = [
        (trellis.decode(first, gate_up, *shapes[0]), trellis.decode(second, down, *shapes[1]))
        for (first, second), (gate_up, down) in zip(formats, blobs, strict=True)
    ]
    experts = trellis_experts(card, layer, np.array(sizes))
    found = experts.forward(*(torch.from_numpy(array).to(card.device) for array in (x, ids, weights)))
    return distance(found.cpu().numpy(), moe_by_decoded(decoded, x, ids, weights, sign))


def int4_error(card: Card, hidden: int, intermediate: int, tokens: int, seed: int = 0) -> float:
    """Of a layer of four INT4 experts."""
    rng = np.random.default_rng(seed)
    shapes = (2 * intermediate, hidden), (hidden, intermediate)
    stacks = kernels.Experts(*(int4_g32.empty(4, *shape) for shape in shapes))
    for stack, shape in zip(stacks, shapes, strict=True):
        for blocks in stack.blocks:
            int4_g32.pack(*int4_g32.encode(rng.standard_normal(shape, np.float32) / shape[1] ** 0.5), blocks)
    decoded = [
        (int4_g32.decode(stacks.gate_up.blocks[i], hidden), int4_g32.decode(stacks.down.blocks[i], intermediate))
        for i in range(4)
    ]
    x, ids, weights = random_choice(tokens, hidden, 4, rng)
    experts = int4_experts(card, stacks, hidden, intermediate)
    found = experts.forward(*(torch.from_numpy(array).to(card.device) for array in (x, ids, weights)))
    return distance(found.cpu().numpy(), moe_by_decoded(decoded, x, ids, weights, None))


def linear_error(card: Card, name: str, rows: int, columns: int, tokens: int, seed: int = 0) -> float:
    """Of a resident matrix in the format `name`."""
    rng = np.random.default_rng(seed)
    matrix = linear.encode(name, rng.standard_normal((rows, columns), np.float32))
    x = rng.standard_normal((tokens, columns), np.float32)
    found = multiply(card.launch, upload(matrix, card.device), torch.from_numpy(x).to(card.device))
    return distance(found.cpu().numpy(), x @ linear.decode(matrix).T)


def attention_error(
    card: Card, lengths: list[int], heads: int, rank: int, rope: int, dtype: torch.dtype, kind: str = "bf16"
) -> float:
    """Of sequences of these lengths, whose pages are scattered over a cache of this kind; values are of `dtype`."""
    generator = torch.Generator().manual_seed(0)
    pages = [-(-length // 64) for length in lengths]
    order = torch.randperm(sum(pages), generator=generator).tolist()
    format = KVFormat(kind, rank, rope)
    cache = stored = torch.randn(64 * len(order), rank + rope, generator=generator).to(dtype)
    if format.reduced:
        stored = encode(cache, format)
        cache = unpack(stored, format, dtype)
    queries = torch.randn(len(lengths), heads, rank + rope, generator=generator).to(dtype)
    tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    expected = []
    for i, (count, length) in enumerate(zip(pages, lengths, strict=True)):
        tables[i, :count] = torch.tensor([order.pop() for _ in range(count)])
        keys = torch.cat([cache[64 * page : 64 * page + 64] for page in tables[i, :count].tolist()])[:length].double()
        expected.append((queries[i].double() @ keys.T * 0.1).softmax(-1) @ keys[:, :rank])
    sequences, sizes = torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    seen = Seen(tables.to(card.device), sequences.to(card.device), sizes.to(card.device), max(lengths))
    found = decode(card.launch, queries.to(card.device), stored.to(card.device), seen, format, 0.1)
    return distance(found.cpu().double().numpy(), torch.stack(expected).numpy())


LADDER = [(name, name) for name in trellis.TRELLIS]
CASES: dict[str, Callable[[Card], float]] = {
    "trellis experts": lambda card: trellis_error(card, LADDER, 192, 96, 3),
    "INT4 experts": lambda card: int4_error(card, 160, 64, 3),
    "int8 matrices": lambda card: linear_error(card, "int8_g32", 160, 96, 3),
    "INT4 matrices": lambda card: linear_error(card, "int4_g32", 160, 96, 3),
    "attention": lambda card: attention_error(card, [300, 1, 64], 20, 64, 16, torch.float16),
    "attention to fp8 rows": lambda card: attention_error(card, [70, 3], 20, 256, 16, torch.float16, "fp8"),
    "attention to int8 rows": lambda card: attention_error(card, [70, 3], 20, 256, 16, torch.float16, "int8"),
}


def first_failure(card: Card) -> str:
    """One line on the first case that `card` does not compute; empty if it computes all."""
    for name, case in CASES.items():
        try:
            error = case(card)
        except Exception as failure:  # whatever a driver, a compiler or a card may raise: such a card is not used
            return f"Our GPU kernels are not used: {name} failed: {first_line(failure)}"
        if not error < CLOSE:
            return f"Our GPU kernels are not used: {name} came out wrong (relative error {error:.2g})."
    return ""
