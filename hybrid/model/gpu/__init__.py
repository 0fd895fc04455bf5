"""Our kernels on a card: Triton twins of the CPU's, which read the same bytes.

Nothing here imports Triton until a card is looked for. What a card cannot do is done as before: a reason in one line
instead of a `Card` means torch's own products on that device, or the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from hybrid.errors import KimiError

__all__ = ["Card", "find_card"]

Launch = Callable[..., None]  # a kernel, its grid, its arguments; constants by name


@dataclass(frozen=True)
class Card:
    """A device that runs our kernels, and how one is started there."""

    device: torch.device
    launch: Launch


def launch(kernel, grid, *arguments, **constants) -> None:
    """Start a Triton kernel. Raises KimiError if it cannot be compiled for, or started on, this card."""
    from triton.errors import TritonError

    try:
        kernel[grid](*arguments, enable_fp_fusion=True, **constants)
    except (TritonError, RuntimeError) as error:
        raise KimiError(
            f"The GPU kernel {kernel.fn.__name__} failed: {first_line(error)}", "Try --device cpu."
        ) from error


def find_card(device: torch.device) -> tuple[Card | None, str]:
    """The card `device`, once its kernels have computed what they should; else None and the reason, one line.

    The reason is empty for a CPU, which needs none.
    """
    if device.type != "cuda":
        return None, ""
    if find_spec("triton") is None:
        return None, "Our GPU kernels need Triton, which is not installed (pip install triton)."
    from hybrid.model.gpu.check import first_failure

    card = Card(device, launch)
    failure = first_failure(card)
    return (None, failure) if failure else (card, "")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    said = error.message if isinstance(error, KimiError) else str(error)
    return (said.strip() or type(error).__name__).splitlines()[0]
