"""Strings that end an answer: wherever tokens and letters are cut, the text ends before the first of them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid import Kimi, SamplingParams
from hybrid.chat.message import Message, Part, Text, Think
from hybrid.chat.stops import Stops

HELLO = [Message("user", "hello there")]


def until_stop(text: str, strings: list[str]) -> tuple[str, str | None]:
    """A letter at a time: what comes before the string that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        for string in sorted(strings, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end - len(string)], string
    return text, None


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_where_the_text_is_cut_makes_no_difference(pieces: list[str], strings: list[str]) -> None:
    stops = Stops(strings)
    told = ""
    text, found = until_stop("".join(pieces), strings)
    for piece in pieces:
        told += stops.feed(piece)
        assert text.startswith(told), "what was told is never taken back"
    assert (told + stops.flush(), stops.found) == (text, found)
    assert stops.behind == (len("".join(pieces)) - len(text) if found else 0)


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    stops = Stops(["END", "\n\n"])
    assert [stops.feed(piece) for piece in ("one E", "N", "x\n", "two", "EN", "D!")] == [
        "one ",
        "",
        "ENx",
        "\ntwo",
        "",
        "",
    ]
    assert (stops.found, stops.behind, stops.flush()) == ("END", 4, "")


@pytest.fixture(scope="module")
def kimi(tiny: Path) -> Iterator[Kimi]:
    with Kimi.load(tiny, ctx=512, threads=1) as kimi:
        yield kimi


@pytest.fixture(scope="module")
def params(kimi: Kimi) -> SamplingParams:
    return replace(kimi.default_params(False), seed=1, max_tokens=60)


def text_of(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


@pytest.mark.parametrize("at", [0, 7, 20])
@pytest.mark.parametrize("shared", [False, True])
def test_an_answer_ends_before_its_stop(tiny: Path, at: int, shared: bool) -> None:
    with Kimi.load(tiny, ctx=512, threads=1) as kimi:
        params = replace(kimi.default_params(False), seed=1, max_tokens=60)
        whole = kimi.reply(HELLO, params, thinking=False)
        text = text_of(list(whole))
        stop = text[at : at + 5]
        if shared:
            kimi.share(batch=2)
        reply = kimi.reply(HELLO, replace(params, stop=("never", stop)), thinking=False)
        before = text[: text.index(stop)]
        assert text_of(list(reply)) == before
        assert reply.message.content == before
        assert (reply.finish_reason, reply.stop_string) == ("stop", stop)
        assert reply.stats.answer_tokens < whole.stats.answer_tokens == 60


def test_what_was_held_back_comes_out_at_the_end(kimi: Kimi, params: SamplingParams) -> None:
    text = text_of(list(kimi.reply(HELLO, params, thinking=False)))
    reply = kimi.reply(HELLO, replace(params, stop=(text[-3:] + "never",)), thinking=False)
    assert text_of(list(reply)) == text == reply.message.content
    assert (reply.finish_reason, reply.stop_string) == ("length", None)


def test_reasoning_is_not_searched(kimi: Kimi, params: SamplingParams) -> None:
    params = replace(params, stop_ids=frozenset())
    thoughts = "".join(part.text for part in kimi.reply(HELLO, params, thinking=True) if isinstance(part, Think))
    reply = kimi.reply(HELLO, replace(params, stop=(thoughts[2:5],)), thinking=True, think_budget=50)
    parts = list(reply)
    assert "".join(part.text for part in parts if isinstance(part, Think))[:20] == thoughts[:20]
    assert reply.stats.thinking_tokens == 51


def test_completions_stop_too_and_tell_scores(kimi: Kimi, params: SamplingParams) -> None:
    ids = kimi.tokenizer.encode("Once upon")
    text = text_of(list(kimi.complete(ids, params)))
    reply = kimi.complete(ids, replace(params, stop=(text[4:6],), logprobs=2))
    assert text_of(list(reply)) == text[: text.index(text[4:6])]
    assert len(reply.logprobs) == reply.stats.answer_tokens and all(len(each.top) == 2 for each in reply.logprobs)


def test_a_reply_may_be_masked(kimi: Kimi, params: SamplingParams) -> None:
    word = kimi.tokenizer.encode("hello")[0]
    only = torch.arange(kimi.config.vocab_size) == word
    reply = kimi.reply(HELLO, replace(params, max_tokens=3), thinking=False, mask=lambda made: only)
    assert text_of(list(reply)) == kimi.tokenizer.decode([word] * 3)
