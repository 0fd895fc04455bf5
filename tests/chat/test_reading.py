"""A reply read to its end: what it says, where a string ends it, and how much of it was reasoning."""

from __future__ import annotations

from hybrid.chat.message import Message
from hybrid.chat.parser import ReplyParser
from hybrid.chat.plain import PlainParser
from hybrid.chat.reading import Reading
from hybrid.chat.tokenizer import Tokenizer


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_prompt(text)


def test_reasoning_is_counted_and_ends_are_left_out(tokenizer: Tokenizer) -> None:
    reading = Reading(ReplyParser(tokenizer, thinking=True))
    stop = min(tokenizer.stop_ids)
    message = reading.read([*ids(tokenizer, "a thought</think>Yes."), stop], tokenizer.stop_ids)
    assert (message.reasoning_content, message.content) == ("a thought", "Yes.")
    assert reading.thoughts == len(tokenizer.encode("a thought")) + 1 and not reading.stopped


def test_a_string_ends_the_answer_and_not_the_reasoning(tokenizer: Tokenizer) -> None:
    reading = Reading(ReplyParser(tokenizer, thinking=True), ["END"])
    taken = []
    for token in ids(tokenizer, "the END is near</think>Here it ENDs, and more"):
        reading.feed(token)
        taken.append(token)
        if reading.stopped:
            break
    assert reading.finish() == []
    message = reading.message()
    assert (message.reasoning_content, message.content) == ("the END is near", "Here it ")
    assert tokenizer.decode(taken).endswith("END") or "ENDs" in tokenizer.decode(taken)


def test_a_text_is_taken_as_it_is(tokenizer: Tokenizer) -> None:
    reading = Reading(PlainParser(tokenizer), ["\n\n"])
    assert reading.read(ids(tokenizer, "one\ntwo\n\nthree"), ()).content == "one\ntwo"
    assert reading.stopped and reading.thoughts == 0


def test_the_reasoning_has_a_budget_and_the_answer_none(tokenizer: Tokenizer) -> None:
    thoughts = ids(tokenizer, "one two three four")
    reading = Reading(ReplyParser(tokenizer, thinking=True), budget=3)
    spent = []
    for token in thoughts:
        reading.feed(token)
        spent.append(reading.spent)
    assert spent == [number >= 3 for number in range(1, len(thoughts) + 1)] and len(thoughts) > 3
    for token in ids(tokenizer, "</think>Yes, and more."):
        reading.feed(token)
    assert not reading.spent and reading.thoughts == len(thoughts) + 1
    assert reading.words == len(tokenizer.encode("Yes, and more."))
    assert not Reading(PlainParser(tokenizer), budget=1).spent


def test_parts_come_as_they_are_certain_and_add_up(tokenizer: Tokenizer) -> None:
    """What is shown while a reply is written is what the whole of it says; nothing of a stop string is."""
    reply = "why</think>Some text, then EN and END and more"
    whole = Reading(ReplyParser(tokenizer, thinking=True), ["END"]).read(ids(tokenizer, reply), ())
    reading = Reading(ReplyParser(tokenizer, thinking=True), ["END"])
    parts = [part for token in ids(tokenizer, reply) for part in reading.feed(token)] + reading.finish()
    assert Message.from_parts(parts) == whole == Message("assistant", "Some text, then EN and ", "why")
    assert reading.stop_string == "END" and not reading.called


def test_a_call_stands_between_the_halves_of_a_string(tokenizer: Tokenizer) -> None:
    call = "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    reading = Reading(ReplyParser(tokenizer, thinking=False), ["END"])
    message = reading.read(ids(tokenizer, f"EN{call}D"), ())
    assert reading.called and not reading.stopped and len(message.tool_calls) == 1
    stopped = Reading(ReplyParser(tokenizer, thinking=False), ["END"])
    stopped.read(ids(tokenizer, f"END{call}"), ())
    assert stopped.stopped and not stopped.called
