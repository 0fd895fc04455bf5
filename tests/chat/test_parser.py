"""Replies to parts: examples, every chunking and truncation, and an independent reading of the whole text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.chat.message import Message, Part, Text, Think, ToolCall, join_parts
from hybrid.chat.parser import ReplyParser, parse_reply
from hybrid.chat.template import DEFAULT_TEMPLATE, ChatTemplate
from hybrid.chat.tokenizer import Tokenizer

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, WITH, DONE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


def written(call_id: str, arguments: str = "{}", end: str = DONE) -> str:
    """A call as the model writes it."""
    return f"{CALL}{call_id}{WITH}{arguments}{end}"


def ping(index: int, end: str = DONE) -> str:
    return written(f"functions.ping:{index}", "{}", end)


def pong(index: int) -> ToolCall:
    return ToolCall(f"functions.ping:{index}", "ping", "{}")


WEATHER = written("functions.get_weather:0", '{"city": "Paris"}')
PARIS = ToolCall("functions.get_weather:0", "get_weather", '{"city": "Paris"}')
SPACED = written(" functions.get_weather:0 \n", ' {"city": "Paris"} ')

# name -> (reply as the model writes it after <think>, its parts)
REPLIES: dict[str, tuple[str, list[Part]]] = {
    "plain": (" The user…</think> Hi!<|im_end|>", [Think("The user…"), Text("Hi!")]),
    "blanks around the reasoning": ("\n a  b \n\n</think>\n\n c \n", [Think("a  b"), Text("c \n")]),
    "no reasoning": ("</think>Hi", [Text("Hi")]),
    "never closed": ("a\nb \n", [Think("a\nb")]),
    "nothing": ("", []),
    "only blanks": ("  \n", []),
    "reasoning again": ("a</think>b<think> c </think> d", [Think("a"), Text("b"), Think("c"), Text("d")]),
    "opened twice": ("<think>a</think>b</think>c", [Think("a"), Text("bc")]),
    "a call": (f"hm</think>Let me see.{BEGIN}{WEATHER}{END}<|im_end|>", [Think("hm"), Text("Let me see."), PARIS]),
    "blanks between": (f"x</think>{BEGIN}\n {SPACED} \n{ping(1)}\n{END}\n", [Think("x"), PARIS, pong(1)]),
    "several calls": (f"</think>{BEGIN}{WEATHER}{ping(1)}{ping(2)}{END}", [PARIS, pong(1), pong(2)]),
    "several sections": (f"</think>{BEGIN}{ping(0)}{END}{BEGIN}{ping(1)}{END}", [pong(0), pong(1)]),
    "a section ends the reasoning": (f"let me{BEGIN}{WEATHER}{END}", [Think("let me"), PARIS]),
    "a call ends the reasoning": (f"let me {WEATHER}", [Think("let me"), PARIS]),
    "a slip in the section's name": (
        f"x<|tool_call_section_begin|>{WEATHER}<|tool_call_section_end|> ok",
        [Think("x"), PARIS, Text("ok")],
    ),
    "without a section": (f"</think>See:{WEATHER} and {ping(1)}", [Text("See:"), PARIS, Text("and "), pong(1)]),
    "text behind the calls": (f"</think>{BEGIN}{WEATHER}{END}\n\nDone.", [PARIS, Text("Done.")]),
    "id without prefix": (f"</think>{written('ping:4')}", [pong(4)]),
    "id without number": (f"</think>{written('functions.ping')}", [pong(0)]),
    "id of another kind": (f"</think>{written('a.b-c')}", [ToolCall("functions.a.b-c:0", "a.b-c", "{}")]),
    "dots, dashes and colons": (
        f"</think>{written('functions.a.b-c:d:7')}",
        [ToolCall("functions.a.b-c:d:7", "a.b-c:d", "{}")],
    ),
    "the same id twice": (f"</think>{ping(0)}{ping(0)}{ping(1)}", [pong(0), pong(1), pong(2)]),
    "no arguments": (f"</think>{written('functions.ping:0', ' ')}", [pong(0)]),
    "arguments that are no JSON": (f"</think>{written('f:0', '{a')}", [ToolCall("functions.f:0", "f", "{a")]),
    "end of the call forgotten": (f"</think>{BEGIN}{ping(0, '')}{ping(1, '')}{END}", [pong(0), pong(1)]),
    "half a call before the next": (f"</think>{written('f:0', '{', '')}{ping(1)}", [Text("f:0 {"), pong(1)]),
    "an id and no arguments": (f"</think>a{CALL}functions.f:0{DONE}b", [Text("a\nfunctions.f:0b")]),
    "no id": (f"</think>{written(' ')}", [Text("{}")]),
    "a call cut in its arguments": (
        f"</think>a{BEGIN}{ping(0)}{written('functions.f:1', '{}', '')}",
        [Text("a"), pong(0), Text("\nfunctions.f:1 {}")],
    ),
    "a call cut in its id": (f"</think>{BEGIN}{CALL}functions.f", [Text("functions.f")]),
    "an empty section": (f"</think>a{BEGIN}{END}b", [Text("ab")]),
}
STRAY = {
    "control tokens": ("a<|im_middle|>b</think>c[EOS]<|media_pad|>d<|im_end|>", [Think("ab"), Text("cd")]),
    "reserved tokens": ("</think>a<|reserved_token_{}|>b", [Text("ab")]),
    "markers out of place": (
        f"{DONE}a{END}{WITH}</think>{WITH}b{DONE}{CALL}functions.ping:0{WITH}{{</think>{WITH}{BEGIN}}}{DONE}",
        [Think("a"), Text("b"), pong(0)],
    ),
}


def read(tokenizer: Tokenizer, reply: str, *, thinking: bool = True) -> list[Part]:
    """Parse a reply in which special tokens are special tokens, where the vocabulary has them."""
    return parse_reply(tokenizer.encode_prompt(reply), tokenizer, thinking)


@pytest.mark.parametrize("name", REPLIES)
def test_replies(tokenizer: Tokenizer, name: str) -> None:
    reply, parts = REPLIES[name]
    assert read(tokenizer, reply) == parts


@pytest.mark.parametrize("name", REPLIES)
def test_replies_of_a_vocabulary_without_markers(foreign: Tokenizer, name: str) -> None:
    reply, parts = REPLIES[name]
    assert parse_reply(foreign.encode(reply.removesuffix("<|im_end|>")), foreign, thinking=True) == parts


@pytest.mark.parametrize("name", STRAY)
def test_special_tokens_never_show(tokenizer: Tokenizer, name: str) -> None:
    reply, parts = STRAY[name]
    reserved = next(token for token in tokenizer.specials if token.startswith("<|reserved"))
    assert read(tokenizer, reply.replace("<|reserved_token_{}|>", reserved)) == parts


def test_what_is_spelled_is_no_marker(tokenizer: Tokenizer) -> None:
    """A model that writes about its own format, in a vocabulary that has the markers as tokens."""
    spelled = f"x</think>{BEGIN}{ping(0)}{END}"
    assert parse_reply(tokenizer.encode(spelled), tokenizer, thinking=False) == [Text(spelled)]
    quoted = '{"text": "<|tool_call_section_begin|></think><|tool_call_section_end|>"}'
    call = tokenizer.encode_prompt(f"{CALL}functions.write:0{WITH}") + tokenizer.encode(quoted)
    ids = [*call, tokenizer.specials[DONE]]
    assert parse_reply(ids, tokenizer, thinking=False) == [ToolCall("functions.write:0", "write", quoted)]


def test_the_message_keeps_the_blanks_of_the_model_but_not_those_between_calls(tokenizer: Tokenizer) -> None:
    parser = ReplyParser(tokenizer, thinking=True)
    for token in tokenizer.encode_prompt(f" hm \n</think>\nSee\n{BEGIN}\n{ping(0)}\n{ping(1)} \n{END}\n"):
        parser.feed(token)
    parser.finish()
    assert parser.message() == Message("assistant", "\nSee\n", " hm \n", (pong(0), pong(1)))
    assert parser.message(interrupted=True).interrupted


def test_instant_replies_begin_as_answer(tokenizer: Tokenizer) -> None:
    assert read(tokenizer, " Hi </think> there", thinking=False) == [Text("Hi there")]
    assert read(tokenizer, "<think>oh</think>Hi", thinking=False) == [Think("oh"), Text("Hi")]


def test_calls_are_numbered_on(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_prompt(f"{CALL}f{WITH}{{}}{DONE}{CALL}g{WITH}{{}}{DONE}")
    calls = parse_reply(ids, tokenizer, thinking=False, call_index=5)
    assert [call.id for call in calls if isinstance(call, ToolCall)] == ["functions.f:5", "functions.g:6"]


def test_text_is_held_back_only_while_it_may_be_a_marker(foreign: Tokenizer) -> None:
    parser = ReplyParser(foreign, thinking=True)
    steps: list[tuple[str, list[Part]]] = [
        ("a", [Think("a")]),
        (" <", []),
        ("/thi", []),
        ("s </", [Think(" </this")]),
        ("think", []),
        (">", []),
        ("\n", []),
        ("b<|tool", [Text("b")]),
        ("_x<|tool_call_", [Text("<|tool_x")]),
        ("begin", []),
        ("|>", []),
        ("f:0", []),
    ]
    for text, parts in steps:
        assert join_parts(part for i in foreign.encode(text) for part in parser.feed(i)) == parts
    assert not parser.thinking
    assert parser.finish() == [Text("\nf:0")]


def test_half_a_character_is_held_back(tokenizer: Tokenizer) -> None:
    parser = ReplyParser(tokenizer, thinking=False)
    first, second, *rest = "é".encode() + "🙂".encode()
    assert parser.feed(first) == []
    assert parser.feed(second) == [Text("é")]
    assert [parser.feed(byte) for byte in rest[:2]] == [[], []]
    assert parser.finish() == [Text("\ufffd")]


def test_thinking_follows_the_reply(tokenizer: Tokenizer) -> None:
    parser = ReplyParser(tokenizer, thinking=True)
    seen = []
    for token in tokenizer.encode_prompt("a</think>b<think>c<|tool_calls_section_begin|>"):
        parser.feed(token)
        seen.append(parser.thinking)
    assert seen == [True, False, False, True, True, False]


def test_where_a_reply_begins_is_read_off_the_end_of_the_prompt(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(DEFAULT_TEMPLATE)
    history = [Message("user", "<think>"), Message("assistant", "hi", "hm"), Message("user", "and <think>")]
    for thinking in (True, False):
        prompt = template.render_ids(history, tokenizer, thinking=thinking)
        assert ReplyParser.after(prompt, tokenizer).thinking is thinking
    assert ReplyParser.after(tokenizer.encode_prompt("<think>\n"), tokenizer).thinking
    assert not ReplyParser.after(tokenizer.encode("<think>"), tokenizer).thinking
    assert not ReplyParser.after([], tokenizer).thinking


# Well-formed replies by construction: what is written, and the parts it stands for.
Written = tuple[str, list[Part]]
WORDS = ["the", " a", "\n", " ", "é", "🙂", "<", "</", "<|tool_call", "think>", "中文", "{}"]
PLAIN = st.lists(st.sampled_from(WORDS), max_size=5).map("".join).filter(lambda text: not re.search("</?think>", text))
BLANKS = st.text(" \n", max_size=2)
JSON = st.sampled_from(["{}", '{"a": "é🙂<"}', '{"path": "a b\\n", "n": [1, 2.5]}', "{\n}"])


@st.composite
def replies(draw: st.DrawFn) -> Written:
    thought, answer = draw(PLAIN), draw(PLAIN)
    parts: list[Part] = [Think(thought.strip()), Text(answer.lstrip())]
    text = f"{draw(BLANKS)}{thought}{draw(BLANKS)}</think>{draw(BLANKS)}{answer}"
    arguments = draw(st.lists(JSON, max_size=3))
    blank = draw(BLANKS)
    for index, argument in enumerate(arguments):
        name = f"{blank}functions.f.g-h:{index}{blank}"
        text += f"{BEGIN * (index == 0)}{blank}{CALL}{name}{WITH}{blank}{argument}{blank}{DONE}"
        parts.append(ToolCall(f"functions.f.g-h:{index}", "f.g-h", argument))
    text += f"{blank}{END}{blank}" if arguments else ""
    return text, [part for part in parts if isinstance(part, ToolCall) or part.text]


def in_pieces(text: str, draw: st.DataObject) -> list[str]:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(text)), max_size=8), label="cuts"))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(replies(), st.data())
def test_any_chunking_of_spelled_markers(foreign: Tokenizer, reply: Written, data: st.DataObject) -> None:
    text, parts = reply
    ids = [i for piece in in_pieces(text, data) for i in foreign.encode(piece)]
    assert parse_reply(ids, foreign, thinking=True) == parts
    assert parse_reply(text.encode(), foreign, thinking=True) == parts, "the small vocabulary's first ids are the bytes"


@given(replies(), st.data())
def test_any_chunking_between_marker_tokens(tokenizer: Tokenizer, reply: Written, data: st.DataObject) -> None:
    text, parts = reply
    ids: list[int] = []
    for piece in re.split(r"(</think>|<\|tool_call[a-z_]*\|>)", text):
        known = tokenizer.specials.get(piece)
        ids += [known] if known else [i for part in in_pieces(piece, data) for i in tokenizer.encode(part)]
    assert parse_reply(ids, tokenizer, thinking=True) == parts


def flat(parts: list[Part]) -> str:
    """Everything a reply says, without blanks and without the halves of characters."""
    texts = [f"{part.id}{part.arguments}" if isinstance(part, ToolCall) else part.text for part in parts]
    return re.sub(r"[\s\ufffd]", "", "".join(texts))


@given(replies(), st.data())
def test_truncation_loses_nothing(tokenizer: Tokenizer, reply: Written, data: st.DataObject) -> None:
    ids = tokenizer.encode_prompt(reply[0])
    kept = data.draw(st.integers(0, len(ids)), label="kept")
    parts = parse_reply(ids[:kept], tokenizer, thinking=True)
    calls = [part for part in reply[1] if isinstance(part, ToolCall)]
    assert [part for part in parts if isinstance(part, ToolCall)] == calls[: ids[:kept].count(tokenizer.specials[DONE])]
    said = re.sub(r"[\s\ufffd]", "", tokenizer.decode([i for i in ids[:kept] if not tokenizer.special_name(i)]))
    assert flat(parts) == said


@given(st.lists(st.integers(0, 700), max_size=40), st.booleans())
def test_any_ids_at_all(tokenizer: Tokenizer, ids: list[int], thinking: bool) -> None:
    """Control tokens in any order, broken UTF-8, ids beyond the vocabulary: no failure, and no control token shows."""
    parts = parse_reply(ids, tokenizer, thinking)
    spelled = tokenizer.decode([i for i in ids if not tokenizer.special_name(i)])
    assert not any(name in flat(parts) for name in tokenizer.specials if name not in spelled)
    parser = ReplyParser(tokenizer, thinking)
    streamed = [part for i in ids for part in parser.feed(i)] + parser.finish()
    assert join_parts(streamed) == parts
    assert parser.message().tool_calls == tuple(part for part in parts if isinstance(part, ToolCall))


def test_calls_in_the_real_vocabulary(real: Tokenizer) -> None:
    reply = f" Zwei Städte…</think> Ich schaue nach. 🙂{BEGIN}{WEATHER}{ping(1)}{END}<|im_end|>"
    parts = [Think("Zwei Städte…"), Text("Ich schaue nach. 🙂"), PARIS, pong(1)]
    assert parse_reply(real.encode_prompt(reply), real, thinking=True) == parts


@given(replies())
def test_the_message_continues_the_very_tokens(tokenizer: Tokenizer, reply: Written) -> None:
    """A turn in a tool loop, rendered again, is the prompt and the reply as they are in the cache."""
    template = ChatTemplate(DEFAULT_TEMPLATE)
    question = Message("user", "q")
    text = f" hm \n</think> See\n{BEGIN}{ping(0)}{ping(1)}{END}"
    for body in (text, re.sub(r"\s+(?=<\|)|(?<=\|>)\s+", "", reply[0])):
        if CALL not in body:
            continue
        parser = ReplyParser(tokenizer, thinking=True)
        generated = tokenizer.encode_prompt(body)
        for token in generated:
            parser.feed(token)
        parser.finish()
        prompt = template.render_ids([question], tokenizer)
        again = template.render_ids([question, parser.message()], tokenizer, add_generation_prompt=False)
        assert again == [*prompt, *generated, tokenizer.specials["<|im_end|>"]]


ARGUMENTS = st.one_of(JSON, st.text(max_size=8).map(lambda text: text.strip() or "{}"))
NAME = st.text("abc.-_:é", min_size=1, max_size=6)


@given(st.text(max_size=10), st.text(max_size=10), st.lists(st.tuples(NAME, ARGUMENTS), min_size=1, max_size=3))
def test_tool_calls_survive_template_and_parser(
    tokenizer: Tokenizer, thought: str, answer: str, pairs: list[tuple[str, str]]
) -> None:
    calls = tuple(ToolCall(f"functions.{name}:{index}", name, text) for index, (name, text) in enumerate(pairs))
    message = Message("assistant", answer.lstrip(), thought.strip() or None, calls)
    template = ChatTemplate(DEFAULT_TEMPLATE)
    prompt = template.render_ids([], tokenizer)
    ids = template.render_ids([message], tokenizer, add_generation_prompt=False)
    assert ids[: len(prompt)] == prompt
    assert Message.from_parts(parse_reply(ids[len(prompt) :], tokenizer, thinking=True)) == message
