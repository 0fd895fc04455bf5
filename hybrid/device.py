"""The processor the runtime uses: how many threads, and on which torch device the resident weights live."""

import logging
import os

import psutil
import torch

from hybrid.errors import UsageError

log = logging.getLogger(__name__)


def default_threads() -> int:
    """Physical cores this process may use: a second hardware thread per core adds no memory bandwidth."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def use_threads(threads: int | None) -> int:
    """Give torch and the kernels `threads` threads (default: one per physical core); returns the number in use."""
    import numba

    limit = numba.config.NUMBA_NUM_THREADS
    count = threads or min(default_threads(), limit)
    if not 1 <= count <= limit:
        raise UsageError(f"--threads {count} is not possible here.", f"Choose 1 to {limit}.")
    torch.set_num_threads(count)
    numba.set_num_threads(count)
    return count


def choose_device(name: str | None) -> torch.device:
    """`None` is a CUDA card if torch can use one, else the CPU; a name is checked against what it can use here."""
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = f"Device {wanted!r} cannot be used: {str(error).splitlines()[0]}"
        if name is not None:
            raise UsageError(reason, "Try --device cpu.") from error
        log.warning("%s The CPU is.", reason)
        return torch.device("cpu")
    return device
