"""Text and ids: against tiktoken built here from the documented pattern, and against a slow BPE of our own."""

import base64
import json
import random
import shutil
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from hybrid.chat import tokenizer as module
from hybrid.chat.tokenizer import CONFIG_FILE, KIMI_SPECIALS, MODEL_FILE, StreamDecoder, Tokenizer, write_tokenizer
from hybrid.errors import CheckpointError

UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = (
    r"[\p{Han}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Letters and signs of many scripts, combining marks, emoji with joiners, numbers of several kinds, blanks of all sorts.
ALPHABETS = [
    "abcdefghij ABCDEFG 'sStTrReEvVmMlLdD",
    "àéîöüßçñøåÆŒǅǈſıİ\u0301\u0308\u0323",
    "你好世界一个助手中文々〇〆仝㐀\U00020000\U0002a6df",
    "日本語のテキスト、カタカナー。ｶﾀｶﾅ",
    "한국어문장입니다ㄱㄴㄷ",
    "العربيةפורמטहिन्दीไทยবাংলা\u200c\u200d\u200f",
    "ΑαΒβΓγЖжЯяԱա\u02b0\u02b2ªº",
    "0123456789٣४၃ⅣⅫ½²٪",
    "🙂👩👧🏽🇩🇪\u200d\ufe0f❤★→∑€",
    " \t\n\r\u00a0\u2003\u3000\u2028\u200b\ufeff\x0b\x0c\x1c\x85",
    ".,;:!?-_()[]{}<>|/\\\"'`@#$%^&*+=~",
    "\x00\x01\x7f\x80\ud7ff\ue000\ufffd\uffff\U0010ffff",
]


def random_text(rng: random.Random) -> str:
    """Runs of letters from a few alphabets; sometimes long runs of one sign, sometimes a special token's name."""
    runs = []
    for _ in range(rng.randint(1, 12)):
        alphabet = rng.choice(ALPHABETS)
        runs.append("".join(rng.choices(alphabet, k=rng.randint(1, 8))))
        if rng.random() < 0.1:
            runs.append(rng.choice(alphabet) * rng.randint(2, 30))
        if rng.random() < 0.05:
            runs.append(rng.choice(list(KIMI_SPECIALS.values()))[0])
    return "".join(runs)


def read_ranks(directory: Path) -> dict[bytes, int]:
    lines = (directory / MODEL_FILE).read_text().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def slow_encode(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding as it is defined: of all neighbours, join those that make the token of the lowest rank."""
    ids = []
    for piece in regex.findall(PATTERN, text, flags=regex.V1):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            joins = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
            if not joins or min(joins) == len(ranks):
                break
            first = joins.index(min(joins))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_documented_vectors(real: Tokenizer, real_vocabulary: Path) -> None:
    vectors = json.loads((real_vocabulary / "vectors.json").read_text())
    assert len(vectors) == 21
    for vector in vectors:
        assert real.encode(vector["text"]) == vector["ids"]
        assert real.decode(vector["ids"]) == vector["text"]


def test_documented_facts(real: Tokenizer) -> None:
    assert real.vocab_size == 163_840
    assert real.stop_ids == {163_585, 163_586, 163_593}
    assert (real.specials["<|im_end|>"], real.specials["</think>"], real.specials["[PAD]"]) == (163586, 163607, 163839)
    assert real.specials["<|reserved_token_163700|>"] == 163_700
    assert len(real.specials) == 256
    assert real.encode("1234567") == [6694, 12972, 22]
    assert real.encode("tool_declare") == [20960, 35556, 677]


def test_equal_to_tiktoken_on_random_text(real: Tokenizer, real_vocabulary: Path) -> None:
    encoding = tiktoken.Encoding(
        "oracle", pat_str=PATTERN, mergeable_ranks=read_ranks(real_vocabulary), special_tokens={}
    )
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(10_000)]
    assert sum(map(len, texts)) > 300_000
    for text in texts:
        ids = real.encode(text)
        assert ids == encoding.encode(text, disallowed_special=()), repr(text)
        assert real.decode(ids) == text


def test_equal_to_slow_bpe(real: Tokenizer, real_vocabulary: Path) -> None:
    ranks = read_ranks(real_vocabulary)
    rng = random.Random(1)
    for _ in range(400):
        text = random_text(rng)
        assert real.encode(text) == slow_encode(text, ranks), repr(text)


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_equal_to_slow_bpe_with_a_small_vocabulary(vocabulary: Path, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == slow_encode(text, read_ranks(vocabulary))
    assert tokenizer.decode(ids) == text


def test_names_of_specials_in_text_are_text(tokenizer: Tokenizer) -> None:
    first_special = min(tokenizer.specials.values())
    for name in tokenizer.specials:
        ids = tokenizer.encode(f"a{name}b")
        assert max(ids) < first_special
        assert tokenizer.decode(ids) == f"a{name}b"


def test_encode_prompt_knows_all_specials(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_prompt("<|im_end|>" + "".join(tokenizer.specials) + "the [EOS] end")
    expected = [tokenizer.specials["<|im_end|>"], *tokenizer.specials.values(), *tokenizer.encode("the ")]
    assert ids == [*expected, tokenizer.specials["[EOS]"], *tokenizer.encode(" end")]


def test_the_longest_name_counts() -> None:
    names = {256: ("<a>", True), 257: ("<a>>", True)}
    assert Tokenizer([bytes([byte]) for byte in range(256)], names).encode_prompt("<a>><a>") == [257, 256]


def test_decoding_for_people_hides_control_tokens_only(tokenizer: Tokenizer) -> None:
    reserved = next(name for name in tokenizer.specials if name.startswith("<|reserved"))
    text = f"<|im_user|>user<|im_middle|><think>hm</think>hi{reserved}<|im_end|>"
    ids = tokenizer.encode_prompt(text)
    assert tokenizer.decode(ids) == "user<think>hm</think>hi"
    assert tokenizer.decode(ids, skip_special=False) == text


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer: Tokenizer) -> None:
    beyond = tokenizer.vocab_size + 5
    assert tokenizer.decode([beyond, *tokenizer.encode("a")]) == "a"
    assert tokenizer.decode([beyond], skip_special=False) == f"<|reserved_token_{beyond}|>"
    assert tokenizer.special_name(beyond) == f"<|reserved_token_{beyond}|>"


@given(st.text(st.characters(codec="utf-8")), st.randoms(use_true_random=False))
def test_stream_decoder_equals_decode(tokenizer: Tokenizer, text: str, rng: random.Random) -> None:
    """Also with broken UTF-8 and with control tokens in the middle of a character."""
    ids = [*tokenizer.encode(text), *rng.choices(range(tokenizer.vocab_size), k=rng.randint(0, 10))]
    rng.shuffle(ids)
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.feed(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


def test_stream_decoder_holds_back_half_a_character(tokenizer: Tokenizer) -> None:
    decoder: StreamDecoder = tokenizer.stream_decoder()
    smile = list("🙂".encode())
    assert [decoder.feed(byte) for byte in smile] == ["", "", "", "🙂"]
    assert [decoder.feed(byte) for byte in smile[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert [decoder.feed(i) for i in tokenizer.encode("ok")] == ["o", "k"]


def slow_cut(text: str, max_chars: int, max_run: int) -> list[str]:
    """The documented cuts, letter by letter."""
    pieces = []
    for start in range(0, len(text), max_chars):
        piece, run = "", ""
        for letter in text[start : start + max_chars]:
            run = run + letter if run and run[-1].isspace() == letter.isspace() else letter
            if len(run) > max_run:
                pieces.append(piece)
                piece, run = "", letter
            piece += letter
        pieces.append(piece)
    return pieces


@given(st.text("ab \n\u3000\x1c\x85", max_size=200))
def test_long_text_is_cut_as_documented(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_CHARS", 50)
        patch.setattr(module, "MAX_RUN", 4)
        assert list(module._cut(text)) == slow_cut(text, 50, 4)


def test_the_cuts_are_part_of_the_encoding(tokenizer: Tokenizer) -> None:
    """A piece ends where the documented limit is, even in the middle of a token."""
    head, word = "x" * (module.MAX_RUN - 5), "functions"
    assert tokenizer.encode(word) != tokenizer.encode(word[:5]) + tokenizer.encode(word[5:])
    assert tokenizer.encode(head + word) == tokenizer.encode(head + word[:5]) + tokenizer.encode(word[5:])


@pytest.mark.parametrize("letter", ["a", " ", "^", "中", "\n", "e\u0301"])
def test_a_million_equal_letters(tokenizer: Tokenizer, letter: str) -> None:
    text = letter * (500_000 // len(letter))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_do_not_crash(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\udc80b")) == "a\ufffdb"


def test_eos_ids_join_the_stop_ids(vocabulary: Path, tokenizer: Tokenizer) -> None:
    names = {tokenizer.specials[name] for name in ("<|im_end|>", "[EOS]", "[EOT]")}
    assert tokenizer.stop_ids == names
    assert Tokenizer.from_directory(vocabulary, eos_ids=[7]).stop_ids == names | {7}


def test_without_a_config_the_names_are_kimis(tmp_path: Path, vocabulary: Path, tokenizer: Tokenizer) -> None:
    shutil.copy(vocabulary / MODEL_FILE, tmp_path)
    assert Tokenizer.from_directory(tmp_path).specials == tokenizer.specials


def test_written_config_equals_the_released_one(tmp_path: Path, real_vocabulary: Path) -> None:
    ranks = read_ranks(real_vocabulary)
    write_tokenizer(tmp_path, sorted(ranks, key=ranks.__getitem__))
    assert (tmp_path / MODEL_FILE).read_bytes() == (real_vocabulary / MODEL_FILE).read_bytes()
    ours, theirs = (json.loads((d / CONFIG_FILE).read_text()) for d in (tmp_path, real_vocabulary))
    for key in ("added_tokens_decoder", "additional_special_tokens", "bos_token", "eos_token", "pad_token"):
        assert ours[key] == theirs[key]


def damage(directory: Path, name: str, change: str) -> None:
    path = directory / name
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    path.write_bytes(
        {
            "empty": b"",
            "cut in a line": data[: len(data) // 2 - 1],
            "cut between lines": b"".join(lines[:-3]),
            "line lost": b"".join(lines[:100] + lines[101:]),
            "lines swapped": b"".join([*lines[:300], *lines[301:302], *lines[300:301], *lines[302:]]),
            "not base64": b"?!" + data[2:],
            "not text": b"\xff\xfe" + data,
            "a list": b"[1]",
            "wrong table": b'{"added_tokens_decoder": [1]}',
            "wrong id": b'{"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}',
        }[change]
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [(MODEL_FILE, change) for change in ("empty", "cut in a line", "cut between lines", "line lost", "lines swapped")]
    + [(MODEL_FILE, change) for change in ("not base64", "not text")]
    + [(CONFIG_FILE, change) for change in ("empty", "cut in a line", "not text", "a list", "wrong table", "wrong id")],
)
def test_damaged_files_are_named(tmp_path: Path, vocabulary: Path, name: str, change: str) -> None:
    for file in (MODEL_FILE, CONFIG_FILE):
        shutil.copy(vocabulary / file, tmp_path)
    damage(tmp_path, name, change)
    with pytest.raises(CheckpointError, match=str(tmp_path)) as error:
        Tokenizer.from_directory(tmp_path)
    assert "download" in error.value.remedy
    assert "\n" not in str(error.value)


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=MODEL_FILE) as error:
        Tokenizer.from_directory(tmp_path)
    assert error.value.remedy
