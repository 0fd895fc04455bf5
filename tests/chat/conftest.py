"""Vocabularies for the chat tests: a small one written here, the same without Kimi's markers, and the real one."""

import json
from pathlib import Path

import pytest

from hybrid.chat.tokenizer import CONFIG_FILE, MODEL_FILE, Tokenizer, write_tokenizer

REAL = Path(__file__).parents[2] / "../shared/data/tokenizer"
WORDS = [
    " the",
    " reasoning",
    "functions",
    "get_weather",
    '{"',
    '":',
    "tool_call",
    "im_end",
    "think",
    "中文",
    "é",
    "🙂",
]


def small_ranks() -> list[bytes]:
    """The 256 single bytes, then every beginning of a few words, so that each merge is of two earlier tokens."""
    merged = dict.fromkeys(word.encode()[:end] for word in WORDS for end in range(2, len(word.encode()) + 1))
    return [bytes([byte]) for byte in range(256)] + list(merged)


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a small vocabulary with Kimi's special tokens; read only."""
    directory = tmp_path_factory.mktemp("vocabulary")
    write_tokenizer(directory, small_ranks())
    return directory


@pytest.fixture(scope="session")
def tokenizer(vocabulary: Path) -> Tokenizer:
    return Tokenizer.from_directory(vocabulary)


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary that knows none of Kimi's markers, so the model can only spell them."""
    directory = tmp_path_factory.mktemp("foreign")
    write_tokenizer(directory, small_ranks())
    names = {str(len(small_ranks())): {"content": "<s>", "special": True}}
    (directory / CONFIG_FILE).write_text(json.dumps({"added_tokens_decoder": names}))
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="session")
def real_vocabulary() -> Path:
    """Directory of Kimi K2.5's own tokenizer files."""
    if not (REAL / MODEL_FILE).exists():
        pytest.skip("Kimi K2.5's own tokenizer files are not on this machine")
    return REAL


@pytest.fixture(scope="session")
def real(real_vocabulary: Path) -> Tokenizer:
    return Tokenizer.from_directory(real_vocabulary)
