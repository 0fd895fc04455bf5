from __future__ import annotations

import inspect

import pytest

from cli.chat import chat
from cli.options import ChatOptions, parse_bytes, parse_room, parse_tokens
from hybrid.errors import UsageError


@pytest.mark.parametrize(
    "text, number",
    [("8192", 8192), ("32k", 32768), ("32K", 32768), ("1.5k", 1536), ("96k", 98304), ("1M", 1 << 20),
     ("32,768", 32768), ("32_768", 32768), (" 4k ", 4096)],
)  # fmt: skip
def test_tokens(text: str, number: int) -> None:
    assert parse_tokens(text) == number


@pytest.mark.parametrize("text", ["", "k", "-1", "0", "1e3", "32kb", "3 2", "ten", "0.0001k"])
def test_wrong_tokens(text: str) -> None:
    with pytest.raises(UsageError, match="8k"):
        parse_tokens(text)


@pytest.mark.parametrize(
    "text, number",
    [("24G", 24 << 30), ("24g", 24 << 30), ("24GiB", 24 << 30), ("24GB", 24 << 30), ("1.5T", 3 << 39),
     ("512M", 512 << 20), ("1000", 1000)],
)  # fmt: skip
def test_bytes(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "G", "-3G", "24X", "0"])
def test_wrong_bytes(text: str) -> None:
    with pytest.raises(UsageError, match="24G"):
        parse_bytes(text)


def test_room_may_be_none() -> None:
    assert (parse_room("0"), parse_room(" 0 "), parse_room("2G")) == (0, 0, 2 << 30)
    with pytest.raises(UsageError, match="24G"):
        parse_room("-1")


def test_every_parameter_of_chat_is_an_option() -> None:
    parameters = set(inspect.signature(chat).parameters) - {"context", "model_option", "debug"}
    assert parameters == set(ChatOptions.__dataclass_fields__) - {"origins"}
