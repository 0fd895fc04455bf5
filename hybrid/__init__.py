"""The runtime: checkpoints, memory, model, engine, chat, and the `Kimi` facade over them.

`from hybrid import Kimi, SamplingParams` is the whole public Python API; it is resolved on first use so that
importing a light part (errors, chat) does not load torch.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid.engine.sampler import SamplingParams
    from hybrid.kimi import Kimi

__all__ = ["Kimi", "SamplingParams"]

# OpenMP reads this when torch or the kernels load it. Its default is to spin for milliseconds after each parallel loop;
# with two pools (torch's and the kernels') and any other program running, a decode step was 15 to 100 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> object:
    if name == "Kimi":
        from hybrid.kimi import Kimi

        return Kimi
    if name == "SamplingParams":
        from hybrid.engine.sampler import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'hybrid' has no attribute {name!r}")
