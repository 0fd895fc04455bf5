"""Common graphics cards by name: memory, and what their makers say they can do.

The figures are nominal: memory size and bandwidth from data sheets, dense bf16 tensor throughput without sparsity, and
the PCIe generation of a full slot. What programs reach of them is `hybrid.memory.rates`' business.
"""

import re
from typing import NamedTuple

from hybrid.errors import UsageError


class Card(NamedTuple):
    """One graphics card."""

    name: str
    gib: float  # of memory
    gbps: float  # of memory bandwidth
    tflops: float  # bf16, dense
    capability: str  # CUDA compute capability
    pcie_gbps: float  # one way, x16

    @property
    def memory(self) -> int:
        return int(self.gib * (1 << 30))


PCIE3, PCIE4, PCIE5 = 12.0, 25.0, 50.0  # GB/s that copies from pinned memory reach on sixteen lanes

CARDS = (
    Card("2080 Ti", 11, 616, 54, "7.5", PCIE3),
    Card("3060", 12, 360, 51, "8.6", PCIE4),
    Card("3070", 8, 448, 81, "8.6", PCIE4),
    Card("3080", 10, 760, 119, "8.6", PCIE4),
    Card("3080 Ti", 12, 912, 136, "8.6", PCIE4),
    Card("3090", 24, 936, 71, "8.6", PCIE4),
    Card("3090 Ti", 24, 1008, 80, "8.6", PCIE4),
    Card("4060 Ti", 16, 288, 44, "8.9", PCIE4 / 2),
    Card("4070", 12, 504, 58, "8.9", PCIE4),
    Card("4070 Ti", 12, 504, 80, "8.9", PCIE4),
    Card("4070 Ti Super", 16, 672, 88, "8.9", PCIE4),
    Card("4080", 16, 717, 97, "8.9", PCIE4),
    Card("4080 Super", 16, 736, 104, "8.9", PCIE4),
    Card("4090", 24, 1008, 165, "8.9", PCIE4),
    Card("4090 48GB", 48, 1008, 165, "8.9", PCIE4),
    Card("4090 D", 24, 1008, 147, "8.9", PCIE4),
    Card("5060 Ti", 16, 448, 48, "12.0", PCIE5 / 2),
    Card("5070", 12, 672, 62, "12.0", PCIE5),
    Card("5070 Ti", 16, 896, 88, "12.0", PCIE5),
    Card("5080", 16, 960, 113, "12.0", PCIE5),
    Card("5090", 32, 1792, 210, "12.0", PCIE5),
    Card("A4000", 16, 448, 77, "8.6", PCIE4),
    Card("A5000", 24, 768, 111, "8.6", PCIE4),
    Card("A6000", 48, 768, 155, "8.6", PCIE4),
    Card("RTX 4000 Ada", 20, 360, 107, "8.9", PCIE4),
    Card("RTX 5000 Ada", 32, 576, 261, "8.9", PCIE4),
    Card("RTX 6000 Ada", 48, 960, 364, "8.9", PCIE4),
    Card("RTX PRO 4500", 32, 896, 105, "12.0", PCIE5),
    Card("RTX PRO 5000", 48, 1344, 150, "12.0", PCIE5),
    Card("RTX PRO 6000", 96, 1792, 250, "12.0", PCIE5),
    Card("A10", 24, 600, 125, "8.6", PCIE4),
    Card("L4", 24, 300, 121, "8.9", PCIE4),
    Card("L40S", 48, 864, 362, "8.9", PCIE4),
    Card("A100", 40, 1555, 312, "8.0", PCIE4),
    Card("A100 80GB", 80, 2039, 312, "8.0", PCIE4),
    Card("H100", 80, 3350, 989, "9.0", PCIE5),
    Card("H200", 141, 4800, 989, "9.0", PCIE5),
)
# Words in a driver's name for a card that do not tell it from others.
_NOISE = re.compile(r"\b(nvidia|geforce|rtx|gb|gib|generation|pcie|sxm\d?|nvl|hbm\d?e?|tensor|core|gpu|workstation)\b")


def find(name: str) -> Card | None:
    """The card that `name` means, as people write it ("4090", "RTX 3090 Ti") or drivers do; None if it is not here.

    Words are compared; the card that shares all of its words with `name` and has the most of them is meant.
    """
    wanted = _words(name)
    fitting = [card for card in CARDS if _words(card.name) <= wanted]
    return max(fitting, key=lambda card: len(_words(card.name)), default=None)


def find_or_refuse(name: str) -> Card:
    """`find` for what a person typed. Raises UsageError naming the cards."""
    card = find(name)
    if card is None:
        known = ", ".join(card.name for card in CARDS)
        raise UsageError(f"{name!r} is no card known here.", f"Give --vram alone, or one of: {known}.")
    return card


def _words(name: str) -> frozenset[str]:
    spelt = re.sub(r"(\d)(ti|gb|super|d)\b", r"\1 \2", name.lower().replace("-", " "))
    return frozenset(_NOISE.sub(" ", spelt).split())
