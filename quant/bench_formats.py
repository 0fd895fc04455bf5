"""What every format loses, and how fast it is written: Gaussian, INT4-rounded and heavy-tailed weights."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import thread_time
from typing import Any, NamedTuple

import numpy as np

from quant import LADDER, int4_g32, trellis
from quant.encode import encode
from quant.rotation import signs
from quant.scales import from_bits, to_bits

ROWS, COLUMNS = 2048, 7168  # one slab of K2.5's gate and up
FORMATS = (*LADDER, "int4_g32")
MIXES = (("trellis1", "trellis1_5"), ("trellis1_5", "trellis2"), ("trellis2", "trellis2_5"), ("trellis2_5", "trellis3"))
# By their own quantizers, importance 1, rows of 7168: bits, error on Gaussian weights, error on INT4-rounded ones.
PEERS = {
    "llama.cpp iq1_s": (1.5625, 0.23581, 0.23629),
    "ik iq1_kt": (1.7545, 0.14922, 0.14932),
    "llama.cpp iq1_m": (1.75, 0.20352, 0.20451),
    "llama.cpp iq2_xxs": (2.0625, 0.11823, 0.12258),
    "ik iq2_kt": (2.1295, 0.08686, 0.08726),
    "ik iq2_k": (2.375, 0.07774, 0.07845),
    "ik iq2_kl": (2.6897, 0.05262, 0.05247),
    "llama.cpp iq3_xxs": (3.0625, 0.03299, 0.03518),
    "ik iq3_kt": (3.1295, 0.02349, 0.02583),
}


class Loss(NamedTuple):
    """Of some matrices: sums of squares, and the processor time their encoding took."""

    lost: float
    whole: float
    seconds: float


def gaussian(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((ROWS, COLUMNS), np.float32)


def int4_rounded(rng: np.random.Generator) -> np.ndarray:
    """Gaussian weights as K2.5 releases them: the nearest of fifteen steps, the largest of 32 at the seventh."""
    groups = gaussian(rng).reshape(-1, 32)
    scales = from_bits(to_bits(np.abs(groups).max(axis=1) / np.float32(7)))[:, None]
    return (np.rint(groups / scales).clip(-8, 7) * scales).reshape(ROWS, COLUMNS)


def heavy_tailed(rng: np.random.Generator) -> np.ndarray:
    """Student's t with five degrees of freedom, each column with a variance of its own (lognormal)."""
    columns = np.exp(0.5 * rng.standard_normal(COLUMNS)).astype(np.float32)
    return rng.standard_t(5, (ROWS, COLUMNS)).astype(np.float32) * columns


SOURCES = {"gauss": gaussian, "int4": int4_rounded, "heavy": heavy_tailed}


def _loss(name: str, source: str, seed: int) -> Loss:
    weights = SOURCES[source](np.random.default_rng([seed, list(SOURCES).index(source)]))
    whole = float(np.vdot(weights, weights))
    start = thread_time()
    if name == "int4_g32":
        packed, scales = int4_g32.encode(weights)
        seconds = thread_time() - start
        codes = np.stack((packed & 15, packed >> 4), axis=2).reshape(ROWS, COLUMNS).astype(np.float32) - int4_g32.ZERO
        off = codes * np.repeat(from_bits(scales), 32, axis=1) - weights
        return Loss(float(np.vdot(off, off)), whole, seconds)
    found = encode(weights, name, signs(0, seed, "gate_up", COLUMNS))
    return Loss(found.plain_error * whole, whole, thread_time() - start)


def _compile(name: str) -> None:
    """So that no timing holds a compilation."""
    if name != "int4_g32":
        encode(np.ones((16, 32), np.float32), name, np.ones(32, np.int8))


def measure_formats(millions: float, threads: int, report: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A row per format and mix, over at least `millions` of weights of each kind; speed is per core, from Gaussians."""
    matrices = max(1, round(millions * 1e6 / (ROWS * COLUMNS) + 0.49))
    rows: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for name in FORMATS:
            _compile(name)
            row: dict[str, Any] = {"format": name, "bpw": round(_bits(name), 4)}
            for source in SOURCES:
                report(f"{name}, {matrices * ROWS * COLUMNS / 1e6:.0f} M {source} weights")
                losses = list(pool.map(_loss, [name] * matrices, [source] * matrices, range(matrices)))
                row[f"mse_{source}"] = round(sum(each.lost for each in losses) / sum(e.whole for e in losses), 5)
                if source == "gauss":
                    seconds = sum(each.seconds for each in losses)
                    row["encode_mw_s_core"] = round(matrices * ROWS * COLUMNS / seconds / 1e6, 2)
            rows[name] = row
            yield row
    for pair in MIXES:
        yield _mixed(*(rows[name] for name in pair))


def _bits(name: str) -> float:
    if name == "int4_g32":
        return int4_g32.BITS_PER_WEIGHT
    return 8 * trellis.matrix_bytes(name, ROWS, COLUMNS) / (ROWS * COLUMNS)


def _mixed(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Half of the weights in one format, half in the other."""
    row: dict[str, Any] = {"format": f"{a['format']}:{b['format']} 50:50"}
    row |= {key: round((a[key] + b[key]) / 2, 5) for key in a if key.startswith(("bpw", "mse"))}
    speed = 2 / (1 / a["encode_mw_s_core"] + 1 / b["encode_mw_s_core"])
    return row | {"encode_mw_s_core": round(speed, 2)}
