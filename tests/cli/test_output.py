from __future__ import annotations

import pytest

from cli import output
from cli.screen import bar_line, progress_figures


@pytest.mark.parametrize(
    "seconds, words",
    [(0, "0.0 s"), (0.012, "12 ms"), (0.84, "0.8 s"), (9.96, "10 s"), (41.2, "41 s"), (59.6, "1 m 00 s"),
     (192, "3 m 12 s"), (3839, "1 h 03 m"), (3600, "1 h 00 m")],
)  # fmt: skip
def test_duration(seconds: float, words: str) -> None:
    assert output.duration(seconds) == words


@pytest.mark.parametrize(
    "tokens, words",
    [(0, "0"), (812, "812"), (1024, "1k"), (2150, "2.1k"), (32768, "32k"), (131072, "128k"), (1 << 20, "1M")],
)
def test_short_tokens(tokens: int, words: str) -> None:
    assert output.short_tokens(tokens) == words


@pytest.mark.parametrize("number, words", [(640, "640 B"), (93e6, "93.0 MB"), (595.1e9, "595.1 GB"), (2e12, "2.00 TB")])
def test_byte_count(number: float, words: str) -> None:
    assert output.byte_count(number) == words


def test_fitted_breaks_at_the_dots_only() -> None:
    parts = ["prompt 10 tok", "5 tok", "ctx 1k/32k"]
    assert output.fitted(parts, 80) == "prompt 10 tok · 5 tok · ctx 1k/32k"
    assert output.fitted(parts, 24) == "prompt 10 tok · 5 tok\nctx 1k/32k"


def test_bandwidth_tells_the_share_of_the_ceiling() -> None:
    assert output.bandwidth(19.4, 25.0) == "RAM 19 GB/s (78% of 25)"
    assert output.bandwidth(4.26, None) == "RAM 4.3 GB/s"


def test_printable_leaves_nothing_a_terminal_obeys() -> None:
    every_control = "".join(map(chr, [*range(32), *range(127, 160)]))
    assert output.printable(f"a{every_control}b") == "a\t\nb"
    assert output.printable("漢字 é 🙂\r\nnext") == "漢字 é 🙂\nnext"


@pytest.mark.parametrize("width", range(1, 90))
def test_a_bar_fits_every_width(width: int) -> None:
    line = bar_line("Reading", 250, 1000, ["250/1,000 tok", "3.0 s left", "83 tok/s"], width)
    assert len(line) <= max(width, len("Reading"))
    if width >= 80:
        assert line == "Reading ━━━━━━────────────────── 250/1,000 tok · 3.0 s left · 83 tok/s"


def test_progress_figures_count_only_what_this_run_did() -> None:
    assert progress_figures(1500, 2000, "tok", 5.0, start=1000) == ["1,500/2,000 tok", "5.0 s left", "100 tok/s"]
    assert progress_figures(1000, 2000, "tok", 5.0, start=1000) == ["1,000/2,000 tok"]
    assert progress_figures(2 * 10**9, 8 * 10**9, "B", 4.0) == ["2.0/8.0 GB", "12 s left", "0.5 GB/s"]
