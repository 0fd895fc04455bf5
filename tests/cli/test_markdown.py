"""Layout of markdown, and that a stream in any pieces ends as the whole text laid out at once."""

from __future__ import annotations

import io
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from cli.layout import Layout, code_blocks
from cli.markdown import MarkdownStream, PlainStream
from cli.output import make_console

DOCUMENT = r"""# Title *here*
Intro **bold text** and `code` with \(x_1 * y * z\) and
second line <b>html</b>.

1. one
2. two with a long text that must wrap because the terminal is narrow
   ```python
   def f(x):
       return x  # comment
   ```
3. three
   - nested a
   - nested b

| a | b |
|---|--:|
| 1 | 漢字が入ります |
| longer cell text | **x** |

> quote line
> more

---
Link [here](http://x.y) and <http://auto.link>.

```c
int main(void) { return 0; }
```
[ref]: http://foo
日本語のとても長い文章がここにあります。折り返しを確認するためのものです。
"""


class _Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout(make_console(_Tty()), numbered=True)


def plain(lines: list[str]) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


def laid_out(layout: Layout, text: str, width: int = 60) -> list[str]:
    return plain(layout.lines(text, width))


@pytest.mark.parametrize("width", [20, 37, 60, 120])
@pytest.mark.parametrize("live_rows", [2, 8, 100])
def test_pieces_of_any_size_give_the_whole(layout: Layout, width: int, live_rows: int) -> None:
    whole = MarkdownStream(layout)
    whole.feed(DOCUMENT)
    expected = whole.closed(width, final=True)
    for seed in range(6):
        pieces, stream, printed, at = random.Random(seed), MarkdownStream(layout), [], 0
        while at < len(DOCUMENT):
            size = pieces.randint(1, 12)
            stream.feed(DOCUMENT[at : at + size])
            at += size
            printed += stream.closed(width)
            over = max(0, len(stream.open(width)) - live_rows)
            printed += stream.open(width)[:over]
            stream.push(over)
        printed += stream.closed(width, final=True)
        if live_rows > 6:  # a paragraph longer than the screen may keep a marker that was closed later
            assert printed == expected
        assert all(cell_len(line) <= width for line in plain(printed))


markdown = st.text(st.sampled_from(list("ab *_`#>-|1.~[]()\\!\n\t<&漢")), max_size=200)


@settings(max_examples=150, deadline=None)
@given(markdown, st.integers(8, 40))
def test_no_text_breaks_the_layout(layout: Layout, text: str, width: int) -> None:
    lines = laid_out(layout, text, width)
    shown = "".join(lines)
    for letter in "ab漢":
        assert shown.count(letter) >= text.count(letter) - text.count("&")


def test_spans_and_headings(layout: Layout) -> None:
    assert laid_out(layout, "## Head\n\n**b** *i* `c` ~~s~~ plain") == ["Head", "", "b i c s plain"]
    assert "\x1b[1m" in layout.lines("**b**", 20)[0]


def test_a_single_newline_is_a_line_break(layout: Layout) -> None:
    assert laid_out(layout, "roses are red\nviolets are blue") == ["roses are red", "violets are blue"]


def test_html_and_formulas_stay_as_written(layout: Layout) -> None:
    assert laid_out(layout, "<div>x</div>") == ["<div>x</div>"]
    assert laid_out(layout, r"so \(a_1 * b * c\) and \[ x \] and \( open") == [
        r"so \(a_1 * b * c\) and \[ x \] and \( open"
    ]
    assert laid_out(layout, r"1 \* 2") == ["1 * 2"]


def test_links_show_their_address_once(layout: Layout) -> None:
    assert laid_out(layout, "[docs](http://x.y/z) <http://a.b>") == ["docs (http://x.y/z) http://a.b"]
    assert laid_out(layout, "![a cat](cat.png)") == ["a cat (cat.png)"]


def test_code_keeps_its_indentation_and_is_numbered(layout: Layout) -> None:
    text = "```python\nif x:\n    return 1\n```\n\nthen\n\n```\nplain\n```\n"
    assert laid_out(layout, text) == [
        "── python · /copy 1", "if x:", "    return 1", "──", "", "then", "", "── /copy 2", "plain", "──",
    ]  # fmt: skip
    assert code_blocks(text) == ["if x:\n    return 1\n", "plain\n"]


def test_lists_nest_and_number(layout: Layout) -> None:
    text = "3. three\n4. four\n   - inner\n     more\n\n- loose\n\n- list"
    assert laid_out(layout, text) == [
        " 3. three", " 4. four", "     • inner", "       more", "", " • loose", " • list",
    ]  # fmt: skip


def test_tables_align_and_fall_back_to_records(layout: Layout) -> None:
    table = "| name | price |\n|---|---:|\n| kiwi | 3 |\n| fig | 12 |"
    assert laid_out(layout, table) == ["name   price", "────────────", "kiwi       3", "fig       12"]
    assert laid_out(layout, table, 15)[:3] == ["name: kiwi", "price: 3", "──"]


def test_wide_characters_wrap_at_their_width(layout: Layout) -> None:
    assert laid_out(layout, "漢字漢字漢字", 8) == ["漢字漢字", "漢字"]


def test_a_heading_in_the_making_is_not_printed_early(layout: Layout) -> None:
    stream = MarkdownStream(layout)
    stream.feed("para\n\n#")
    assert stream.closed(40) == []
    stream.feed("hashtag\n\nnext")
    assert plain(stream.closed(40)) == ["para"]
    assert plain(stream.closed(40, final=True)) == ["", "#hashtag", "", "next"]


def test_plain_streams_print_whole_lines(layout: Layout) -> None:
    stream = PlainStream(layout, "thought")
    stream.feed("first *line*\nsec")
    assert plain(stream.closed(40)) == ["first *line*"]
    assert plain(stream.open(40)) == ["sec"]
    stream.feed("ond")
    assert plain(stream.closed(40, final=True)) == ["second"]
