"""A reply read to its end: what it says, where a string ends it, and how much of it was reasoning."""

from __future__ import annotations

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
    message = reading.finish()
    assert (message.reasoning_content, message.content) == ("the END is near", "Here it ")
    assert tokenizer.decode(taken).endswith("END") or "ENDs" in tokenizer.decode(taken)


def test_a_text_is_taken_as_it_is(tokenizer: Tokenizer) -> None:
    reading = Reading(PlainParser(tokenizer), ["\n\n"])
    assert reading.read(ids(tokenizer, "one\ntwo\n\nthree"), ()).content == "one\ntwo"
    assert reading.stopped and reading.thoughts == 0
