"""A prompt respelled in the tokens that the model itself wrote."""

from hypothesis import given
from hypothesis import strategies as st

from hybrid.chat.tokenizer import Tokenizer

TEXT = st.text(alphabet='therasoning functions 中é🙂{":', max_size=30)


def bytewise(tokenizer: Tokenizer, text: str) -> list[int]:
    """The same text in other tokens than `encode` chooses."""
    return [byte for char in text for byte in tokenizer_bytes(tokenizer, char)]


def tokenizer_bytes(tokenizer: Tokenizer, char: str) -> list[int]:
    singles = {tokenizer.token_bytes(i): i for i in range(256)}
    return [singles[bytes([byte])] for byte in char.encode()]


def test_an_answer_keeps_its_own_tokens(tokenizer: Tokenizer) -> None:
    user, end = tokenizer.specials["<|im_user|>"], tokenizer.specials["<|im_end|>"]
    seen = [user, *tokenizer.encode(" the reasoning"), end, *bytewise(tokenizer, " the functions")]
    prompt = [user, *tokenizer.encode(" the reasoning"), end, *tokenizer.encode(" the functions"), end, user]
    assert tokenizer.reuse(prompt, seen) == [*seen, end, user]


def test_control_tokens_must_be_the_same(tokenizer: Tokenizer) -> None:
    end = tokenizer.specials["<|im_end|>"]
    spelled = tokenizer.encode("<|im_end|>")
    assert tokenizer.reuse([end], spelled) == [end]
    assert tokenizer.reuse(spelled, [end]) == spelled


@given(TEXT, TEXT, TEXT)
def test_the_text_never_changes(tokenizer: Tokenizer, start: str, a: str, b: str) -> None:
    end = tokenizer.specials["<|im_end|>"]
    prompt = [*tokenizer.encode(start + a), end, *tokenizer.encode(b)]
    seen = [*bytewise(tokenizer, start + a[:5]), *tokenizer.encode(b)]
    found = tokenizer.reuse(prompt, seen)
    assert tokenizer.decode(found, skip_special=False) == tokenizer.decode(prompt, skip_special=False)
    assert [i for i in found if i >= end] == [i for i in prompt if i >= end]


@given(TEXT)
def test_what_the_cache_holds_is_used_as_far_as_it_goes(tokenizer: Tokenizer, text: str) -> None:
    seen = bytewise(tokenizer, text)
    assert tokenizer.reuse([*tokenizer.encode(text), tokenizer.specials["<|im_end|>"]], seen)[: len(seen)] == seen
