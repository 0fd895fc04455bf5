"""Low-bit formats and the SIMD kernels that multiply them; knows no model, no device, no file and no torch.

Importing this package fixes where compiled kernels are kept: one directory per version of this package's source and
per CPU, because Numba checks only the file that defines a loop, not the files it calls into.
"""

import hashlib
from pathlib import Path

import platformdirs
from numba.core import config

from quant.cpu import CPU_NAME, ISA


def _cache_directory() -> Path:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(f"{CPU_NAME} {ISA} {config.CPU_FEATURES}".encode())
    return platformdirs.user_cache_path("kimi-local") / "kernels" / digest.hexdigest()[:16]


if not config.CACHE_DIR:
    config.CACHE_DIR = str(_cache_directory())

from quant import int4_g32, trellis  # noqa: E402  (after the cache directory is set)

LADDER = tuple(trellis.TRELLIS)  # from fewest to most bits
FORMATS = {"int4_g32": int4_g32} | dict.fromkeys(LADDER, trellis)

__all__ = ["FORMATS", "ISA", "LADDER"]
