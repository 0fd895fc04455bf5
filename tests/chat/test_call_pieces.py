"""Calls as they are written."""

from hypothesis import given
from hypothesis import strategies as st

from hybrid.chat.message import CallPiece, Part, Text, ToolCall
from hybrid.chat.parser import ReplyParser
from hybrid.chat.tokenizer import KIMI_SPECIALS, Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)], {256 + i: name for i, name in KIMI_SPECIALS.items()})
BEGIN, ARGUMENTS, END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


def parse(text: str, *, call_pieces: bool = True) -> list[Part]:
    parser = ReplyParser(TOKENIZER, thinking=False, call_pieces=call_pieces)
    parts = [part for token in TOKENIZER.encode_prompt(text) for part in parser.feed(token)]
    return parts + parser.finish()


@given(st.lists(st.text("ab .{}\n", max_size=12), min_size=1, max_size=3))
def test_the_pieces_of_a_call_are_the_call(arguments: list[str]) -> None:
    parts = parse("".join(f"{BEGIN} functions.do:{n}{ARGUMENTS}{text}{END}" for n, text in enumerate(arguments)))
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert len(calls) == len(arguments)
    for call in calls:
        pieces = [part for part in parts if isinstance(part, CallPiece) and part.id == call.id]
        assert {piece.name for piece in pieces} == {"do"} and pieces[0].arguments == ""
        assert "".join(piece.arguments for piece in pieces) == call.arguments
        assert parts.index(pieces[-1]) < parts.index(call)


def test_the_name_comes_before_the_first_argument() -> None:
    assert parse(f"{BEGIN}look{ARGUMENTS}") == [CallPiece("functions.look:0", "look", "")]


def test_what_is_cut_off_comes_once() -> None:
    text = f'{BEGIN}look{ARGUMENTS}{{"a'
    assert "".join(part.arguments for part in parse(text) if isinstance(part, CallPiece)) == '{"a'
    assert not any(isinstance(part, Text) for part in parse(text))
    assert parse(text, call_pieces=False) == [Text('look {"a')]


def test_a_call_without_a_name_is_text() -> None:
    assert [type(part) for part in parse(f"{BEGIN}{ARGUMENTS}{{}}{END}")] == [Text]


def test_nobody_gets_pieces_without_asking() -> None:
    assert not any(isinstance(part, CallPiece) for part in parse(f"{BEGIN}x{ARGUMENTS}{{}}{END}", call_pieces=False))
