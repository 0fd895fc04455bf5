"""Output that is no conversation."""

from hypothesis import given
from hypothesis import strategies as st

from hybrid.chat.message import Text
from hybrid.chat.plain import PlainParser
from hybrid.chat.tokenizer import KIMI_SPECIALS, Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)], {256 + i: name for i, name in KIMI_SPECIALS.items()})


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40))
def test_the_parts_are_the_decoded_text(ids: list[int]) -> None:
    parser = PlainParser(TOKENIZER)
    parts = [part for token in ids for part in parser.feed(token)] + parser.finish()
    assert "".join(part.text for part in parts if isinstance(part, Text)) == TOKENIZER.decode(ids)
    assert parser.message().content == TOKENIZER.decode(ids) and not parser.thinking
