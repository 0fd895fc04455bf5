"""What people read: numbers with units, the statistics line, and which streams may carry colour."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from hybrid.stats import Stats

THEME = {"quiet": "dim", "thought": "dim italic", "notice": "yellow", "error": "bold red", "prompt": "bold cyan"}


def count(number: int) -> str:
    """1204 -> '1,204'."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """'1 turn', '2 turns'."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def short_tokens(number: int) -> str:
    """Tokens in binary thousands as contexts are named: 812, '2.1k', '32k', '1M'."""
    if number < 1000:
        return str(number)
    for unit, size in (("k", 1 << 10), ("M", 1 << 20)):
        value = number / size
        if value < 999.5 or unit == "M":
            return f"{value:.1f}".removesuffix(".0") + unit
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """'12 ms', '0.8 s', '41 s', '3 m 12 s', '1 h 04 m'."""
    if 0 < seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} m {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m"


def byte_count(number: float) -> str:
    """Decimal units, as disks and memory bandwidth are sold: '640 B', '3.1 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if unit in ("B", "kB") else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} TB"


def rate(number: float) -> str:
    """Per-second figures with two or three digits: '5.8', '96', '1,204'."""
    return f"{number:.1f}" if number < 9.95 else f"{number:,.0f}"


def stats_line(stats: Stats, capacity: int, ceiling_gbps: float | None, width: int) -> str:
    """One reply in a context of `capacity` tokens, in lines of `width`; the ceiling is what this RAM can do."""
    prompt = f"prompt {count(stats.prompt_tokens)} tok"
    if stats.cached_tokens:
        of_disk = f", {count(stats.disk_tokens)} from disk" if stats.disk_tokens else ""
        prompt += f" ({count(stats.cached_tokens)} cached{of_disk})"
    if stats.prefill_tokens_per_s:
        prompt += f" {rate(stats.prefill_tokens_per_s)} tok/s"
    thinking = f"{count(stats.thinking_tokens)}+" if stats.thinking_tokens else ""
    made = f"{thinking}{count(stats.answer_tokens)} tok"
    if stats.decode_tokens_per_s:
        made += f" {rate(stats.decode_tokens_per_s)} tok/s"
    used = stats.prompt_tokens + stats.generated_tokens
    parts = [prompt, made, f"ctx {short_tokens(used)}/{short_tokens(capacity)}"]
    if stats.first_token_s:
        parts.insert(2, f"first token {duration(stats.first_token_s)}")
    if stats.ram_gbps:
        parts.append(bandwidth(stats.ram_gbps, ceiling_gbps))
    if stats.drafted:
        parts.append(f"{count(stats.accepted)} of {count(stats.drafted)} guessed tok right")
    if stats.tier_hits + stats.tier_misses:
        parts.append(drive(stats))
    return fitted(parts, width)


def fitted(parts: Sequence[str], width: int) -> str:
    """The parts with dots between them, broken into lines at the dots."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return "\n".join(lines)


def bandwidth(gbps: float, ceiling_gbps: float | None) -> str:
    """'RAM 19 GB/s (78% of 25)', without the share where no ceiling is known."""
    line = f"RAM {rate(gbps)} GB/s"
    return f"{line} ({gbps / ceiling_gbps:.0%} of {rate(ceiling_gbps)})" if ceiling_gbps else line


def drive(stats: Stats) -> str:
    """'NVMe 1.2 GB/tok, 81% of experts in RAM, waited 12 s', where some experts stay on the drive."""
    per_token = stats.nvme_bytes / max(1, stats.generated_tokens - 1)
    hits = stats.tier_hits / (stats.tier_hits + stats.tier_misses)
    return f"NVMe {byte_count(per_token)}/tok, {hits:.0%} of experts in RAM, waited {duration(stats.stall_s)}"


def is_drawable(stream: TextIO) -> bool:
    """Whether lines may be redrawn in place there: a terminal that knows cursor movement."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def make_console(stream: TextIO) -> Console:
    """A rich console for `stream`: plain when piped or dumb; NO_COLOR and FORCE_COLOR are obeyed by rich itself."""
    from rich.console import Console
    from rich.theme import Theme

    console = Console(file=stream, theme=Theme(THEME), highlight=False, markup=False, emoji=False, soft_wrap=False)
    if stream.isatty() and not is_drawable(stream):
        console.no_color = True
    return console


WIDE = 200  # columns of a table that is not read on a terminal


def print_table(title: str, rows: Iterable[tuple[str, ...]], *, wide: bool = False) -> None:
    """Rows on standard output, which no line ends with blanks; `wide` ones are not folded in a pipe or a file."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False, title_style="bold")
    for row in rows:
        table.add_row(*row)
    console = make_console(sys.stdout)
    if wide and not sys.stdout.isatty():
        console.width = WIDE
    with console.capture() as lines:
        console.print(table)
    print("\n".join(line.rstrip() for line in lines.get().splitlines()))


def tolerate_narrow_encodings() -> None:
    """A character the terminal's encoding lacks is replaced rather than ending the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


# Everything a terminal may obey instead of print: C0 but tab and newline, DEL, C1, and line separators.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029])


def printable(text: str) -> str:
    """Model output made safe for a terminal: no escape sequence or control character survives."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)
