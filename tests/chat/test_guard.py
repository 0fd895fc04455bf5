"""Letters in disguise: what is known of a tokenizer's names once, and what every conversation needs for itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hybrid.chat.guard import PRIVATE, Guard, _known

NAMES = ["<|im_end|>", "[EOS]", "</think>"]
TEXTS = st.text("<|>[]imEOSx \U000f0000\U000f0001", max_size=12)


@given(st.lists(TEXTS, max_size=4))
def test_what_is_disguised_comes_back(texts: list[str]) -> None:
    guard = Guard(NAMES, texts)
    hidden = guard.disguise(texts)
    assert [text.translate(guard.revealed) for text in hidden] == texts
    assert not any(letter in text for text in hidden for letter in "<>[]")


def test_letters_that_a_conversation_uses_hide_nothing_in_it_and_may_in_the_next() -> None:
    first, second = Guard(NAMES, chr(PRIVATE[0])), Guard(NAMES, "plain")
    assert PRIVATE[0] not in first.revealed and PRIVATE[0] in second.revealed


def test_names_are_looked_at_once() -> None:
    _known.cache_clear()
    for text in ("a", "b", "c"):
        Guard(NAMES, text)
    assert (_known.cache_info().misses, _known.cache_info().hits) == (1, 2)
