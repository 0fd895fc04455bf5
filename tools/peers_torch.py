"""What torch's products reach at the shapes of an expert: the ceiling of what decodes experts for them."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import set_num_threads

from hybrid.memory.many import torch_gemm
from quant.bench import CROWDED, product_gflops, random_layer
from quant.gemm import BF16


def crowded(batches: Sequence[int]) -> list[int]:
    """Batch sizes that both our paths compute."""
    return [batch for batch in batches if batch >= CROWDED]


def torch_ceiling(options: argparse.Namespace) -> dict[str, Any]:
    """{"ceiling_gflops": ..} by threads and crowded batch; printed too."""
    layer, found = random_layer("trellis1", 0.0, np.random.default_rng(options.seed), options.shape), {}
    for threads in options.threads:
        set_num_threads(threads)
        gemm = torch_gemm(threads)
        found[str(threads)] = {str(b): round(product_gflops(layer, gemm, b), 1) for b in crowded(options.batch)}
        for batch, gflops in found[str(threads)].items():
            kind = "bf16" if gemm.dtype == BF16 else "fp32"
            print(f"ceiling: {gflops:.1f} GFLOP/s by torch in {kind}, {threads} thread(s), batch {batch}", flush=True)
    return {"ceiling_gflops": found}
