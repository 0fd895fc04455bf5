"""Kimi's tokenizer over the converted vocabulary against the source's own byte-pair encoding."""

import pytest
import tokenizers

from hybrid.chat.tokenizer import KIMI_SPECIALS, NUM_SPECIALS, Tokenizer
from hybrid.demo.gguf_source import GGUFLlama
from hybrid.demo.vocabulary import END, END_OF_TEXT, START, UNUSED, Vocabulary, convert_vocabulary, printable_bytes
from tests.demo.random_llama import CONTROL, RandomLlama

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "In 1969, Apollo 11 landed on the Moon; 650 million people watched.",
    "Don't worry, it's fine: they've said we'll see what's what.",
    'She asked, "Où est la gare?" and he pointed (vaguely) towards the Straße.',
    "Prices rose 3.5% to $1,299.00 -- or £1,020 -- in Q4/2023.",
    "First line.\nSecond line.\n\nNew paragraph:\n- one\n- two\n",
    "def double(x): return 2 * x  # as 'code' on one line",
    "naïve café, coöperation, Ægir, Łódź, žluťoučký kůň",
    "Δx·Δp ≥ ħ/2 and Москва and 🙂",
    "user@example.org visited https://example.org/a?b=c#d",
]


def tokenizer_of(vocabulary: Vocabulary) -> Tokenizer:
    count = len(vocabulary.ranks)
    return Tokenizer(vocabulary.ranks, {count + offset: name for offset, name in KIMI_SPECIALS.items()})


def test_rows_of_a_small_vocabulary() -> None:
    tokens = RandomLlama().tokens
    vocabulary = convert_vocabulary(tokens)
    tokenizer, ranks = tokenizer_of(vocabulary), len(vocabulary.ranks)
    assert len(vocabulary.read) == len(vocabulary.said) == ranks + NUM_SPECIALS
    assert ranks == len(tokens) - len(CONTROL) + 16 and set(vocabulary.ranks[-16:]).isdisjoint(vocabulary.ranks[:-16])

    def rows(name: str) -> tuple[str, str]:
        i = tokenizer.specials[name]
        return tokens[vocabulary.read[i]], tokens[vocabulary.said[i]]

    assert rows("<|im_user|>") == rows("<|im_assistant|>") == rows("<|im_system|>") == (START, UNUSED)
    assert rows("<|im_middle|>") == rows("<think>") == ("Ċ", UNUSED)
    assert rows("<|im_end|>") == (END, END) and rows("[EOS]") == (END_OF_TEXT, END_OF_TEXT)
    assert rows(f"<|reserved_token_{ranks + 100}|>") == (UNUSED, UNUSED)
    for text in ("the hat", "\x00\xff né 東", "one\n\ntwo \n\n\n three"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_blank_lines_are_single_line_breaks() -> None:
    tokens = [*RandomLlama().tokens, "ĊĊ", "ĠĊ", "ĊĠ"]
    vocabulary = convert_vocabulary(tokens)
    tokenizer = tokenizer_of(vocabulary)
    ids = tokenizer.encode("a\n\nb \nc")
    assert [tokens[vocabulary.read[i]] for i in ids] == ["a", "Ċ", "Ċ", "b", "Ġ", "Ċ", "c"]
    assert [tokens[row] for row in vocabulary.said].count("ĊĊ") == 0
    assert len(set(vocabulary.ranks)) == len(vocabulary.ranks)


def test_printable_bytes_is_gpt2s_spelling() -> None:
    spelling = {byte: letter for letter, byte in printable_bytes().items()}
    assert len(spelling) == 256
    assert [spelling[byte] for byte in b" \n\t!~\x7f\xad\xff"] == ["Ġ", "Ċ", "ĉ", "!", "~", "ġ", "Ń", "ÿ"]


@pytest.mark.demo
def test_same_tokens_as_the_source(source: GGUFLlama) -> None:
    merges = [tuple(merge.split(" ")) for merge in source.field("tokenizer.ggml.merges")]
    bpe = tokenizers.models.BPE({token: i for i, token in enumerate(source.tokens)}, merges)
    oracle = tokenizers.Tokenizer(bpe)
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(False)]
    )
    vocabulary = convert_vocabulary(source.tokens)
    tokenizer = tokenizer_of(vocabulary)
    assert len(vocabulary.ranks) == 49_156
    for text in TEXTS:
        assert [vocabulary.read[i] for i in tokenizer.encode(text)] == oracle.encode(text).ids, text
