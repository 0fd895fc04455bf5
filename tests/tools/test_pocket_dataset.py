"""Vocabulary, sources and batches of the pocket model, on a tiny text and without downloads."""

import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pocket.dataset import (
    FIRST_SHARES,
    FIRST_STEPS,
    HELD_OUT_FILE,
    LAST_SHARES,
    SHARES,
    STAGES,
    TEXT_FILE,
    Dataset,
    draw_case,
    shares_at,
)
from pocket.prepare import case_texts, held_out_text, write_text, write_vocabulary
from pocket.smalltalk import TALK
from pocket.sources import Source, clean, conversations
from pocket.vocabulary import count_pieces, train_ranks

from hybrid.chat.message import Message
from hybrid.chat.parser import ReplyParser
from hybrid.chat.template import DEFAULT_TEMPLATE, ChatTemplate
from hybrid.chat.tokenizer import KIMI_SPECIALS, Tokenizer
from hybrid.errors import KimiError
from hybrid.evaluation.case import prompt_ids, reply_ids
from hybrid.evaluation.skills import SKILLS
from hybrid.evaluation.words import ALL

ROWS, LENGTH = 8, 256
CHATS = [[Message("user", "Where is the sea?"), Message("assistant", "It is where the river goes, Anna's river.")]] * 9
PROSE = ["Call me what you will. The sea is wide and the ship is old, and nobody sails. " * 40]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pocket")
    write_vocabulary(path, CHATS, PROSE, cases=800, size=1800)
    write_text(path, CHATS, PROSE)
    return path


@pytest.fixture(scope="module")
def data(directory: Path) -> Dataset:
    return Dataset(directory, seed=0)


def test_a_word_of_a_skill_is_one_token_wherever_it_stands(data: Dataset) -> None:
    for word in ALL:
        (token,) = data.tokenizer.encode(word)
        for around in (" {}", "{}'s", 'called "{}".', "_{}", '": "{}"}', "\n{}", "{},"):
            text = around.replace("{}", word)
            assert data.tokenizer.encode(text).count(token) == 1, text


def test_digits_are_never_merged(data: Dataset) -> None:
    assert len(data.tokenizer.encode("9876543210")) == 10
    assert not [
        token for token in data.tokenizer.encode("in 1234 12+34=46 a7") if len(data.tokenizer.decode([token])) > 2
    ]


def test_text_comes_back(data: Dataset) -> None:
    for text in ("Anna's cat", 'ümlaut 漢字 🙂 "x"\n\n  y', held_out_text()[:2000]):
        assert data.tokenizer.decode(data.tokenizer.encode(text)) == text


def test_words_come_first_and_are_not_joined_to_blanks() -> None:
    ranks = train_ranks(["red"], count_pieces(["the" + " red the redder the 12" * 2]), 262)
    assert ranks[256:] == [b"ed", b"red", b" t", b" th", b" the", b"de"]


def test_a_vocabulary_cannot_be_larger_than_its_text() -> None:
    with pytest.raises(AssertionError, match="261 tokens only"):
        train_ranks(["red"], count_pieces(["the the the"]), 300)


def test_a_batch_follows_from_seed_and_step(directory: Path, data: Dataset) -> None:
    first, again = data.batch(3, ROWS, LENGTH), Dataset(directory, seed=0).batch(3, ROWS, LENGTH)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (data.batch(4, ROWS, LENGTH), Dataset(directory, seed=1).batch(3, ROWS, LENGTH)):
        assert not torch.equal(first.ids, other.ids)


def test_rows_are_full_of_whole_documents(data: Dataset) -> None:
    batch = data.batch(0, ROWS, LENGTH)
    assert [part.dtype for part in batch] == [torch.int64, torch.int64, torch.int32, torch.float32]
    assert {part.shape for part in batch} == {(ROWS, LENGTH)}
    assert int(batch.ids.min()) >= 0 and int(batch.ids.max()) < data.tokenizer.vocab_size
    begins = batch.positions == 0
    assert torch.equal(begins.cumsum(1) - 1, batch.documents.long())
    assert torch.equal(batch.positions[:, 1:][~begins[:, 1:]], batch.positions[:, :-1][~begins[:, 1:]] + 1)
    assert not batch.weights[begins].any()


def test_the_first_steps_practise_finding_words(data: Dataset) -> None:
    def plain_rows(step: int) -> int:
        batch = data.batch(step, 60, LENGTH)
        return int((batch.documents == 0).all(1).sum())

    assert all(set(shares) <= SKILLS.keys() | TALK.keys() for shares in STAGES.values())
    assert [shares_at(step) for step in (0, FIRST_STEPS - 1, FIRST_STEPS, 1 << 30)] == [
        FIRST_SHARES, FIRST_SHARES, SHARES, LAST_SHARES,
    ]  # fmt: skip
    assert plain_rows(FIRST_STEPS - 1) == 0 < plain_rows(FIRST_STEPS)


def test_only_answers_count(data: Dataset) -> None:
    for name in LAST_SHARES.keys() - {"name_recall", "second_question", "lookup_chat", "tool_result"}:
        document = data.document(draw_case(name, random.Random(1)))
        answer = [token for token, weight in zip(document.ids, document.weights, strict=True) if weight]
        said = data.tokenizer.decode(document.ids, skip_special=False)
        reply = data.tokenizer.decode(answer, skip_special=False)
        assert said.endswith(reply) and reply.endswith("<|im_end|>") and reply.count("<|im_end|>") == 1
        assert said.removesuffix(reply).endswith(("<think>", "<think></think>"))


@pytest.mark.parametrize("name", ["second_question", "lookup_chat", "tool_result"])
def test_earlier_answers_count_too(data: Dataset, name: str) -> None:
    case = draw_case(name, random.Random(5))
    document = data.document(case)
    learned = [token if weight else None for token, weight in zip(document.ids, document.weights, strict=True)]
    said = "".join("\0" if token is None else data.tokenizer.decode([token], skip_special=False) for token in learned)
    turns = [turn for turn in said.split("\0") if turn]
    spoken = [message for message in case.messages if message.role == "assistant"] + [case.answer]
    assert len(spoken) > 1 and len(turns) == len(spoken)
    for turn, message in zip(turns, spoken, strict=True):
        assert turn.endswith("<|im_end|>") and message.content in turn
        assert all(call.arguments in turn for call in message.tool_calls)


def test_plain_text_counts_but_for_its_first_token(data: Dataset) -> None:
    document = data._plain(random.Random(0), 40)
    assert document.weights[0] == 0 and set(document.weights[1:]) == {0.5}
    assert bytes(np.array(document.ids, np.uint16)) in bytes(np.load(data.text.filename))


def test_no_held_out_case_is_drawn() -> None:
    rng = random.Random(0)
    for name in SKILLS:
        drawn = [draw_case(name, rng) for _ in range(100)]
        assert {case.split for case in drawn if case.messages[0].role == "user"} == {"train"}
        assert any(case.messages[0].role == "system" for case in drawn)


@pytest.mark.parametrize("name", LAST_SHARES)
def test_documents_are_short(data: Dataset, name: str) -> None:
    rng = random.Random(0)
    lengths = [len(data.document(draw_case(name, rng)).ids) for _ in range(60)]
    assert max(lengths) <= LENGTH


@pytest.mark.parametrize("name", TALK)
def test_small_talk_reads_back(data: Dataset, name: str) -> None:
    rng = random.Random(0)
    for case in (TALK[name](rng) for _ in range(30)):
        parser = ReplyParser.after(prompt_ids(case, data.template, data.tokenizer), data.tokenizer)
        for token in reply_ids(case, data.template, data.tokenizer):
            parser.feed(token)
        parser.finish()
        assert parser.message() == case.answer


def test_the_texts_of_a_case_hold_no_markers() -> None:
    template, rng = ChatTemplate(DEFAULT_TEMPLATE), random.Random(0)
    for name in LAST_SHARES:
        text = "".join(case_texts(draw_case(name, rng), template))
        assert "assistant" in text and not any(marker in text for marker, _ in KIMI_SPECIALS.values())


def test_text_files_close_every_text(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    text, held_out = (np.load(directory / file) for file in (TEXT_FILE, HELD_OUT_FILE))
    end = tokenizer.specials["[EOS]"]
    assert text.dtype == np.uint16 and (text == end).sum() == len(CHATS) + len(PROSE) and text[-1] == end
    assert tokenizer.decode(held_out[:-1].tolist()) == held_out_text()


def test_held_out_text_is_clean() -> None:
    text = held_out_text()
    assert 60_000 < len(text) < 100_000 and text.isascii() and clean(text) == text.strip()


def test_chats_alternate_and_unfit_ones_are_dropped(tmp_path: Path) -> None:
    def chat(*said: tuple[str, str]) -> dict:
        return {"messages": [[{"sender": sender, "text": text}] for sender, text in said]}

    good = chat(("a", "Hi"), ("a", "how  are you?"), ("b", "I’m fine"), ("a", "Nice"), ("b", " "), ("b", "Yes"))
    mail = chat(("a", "Hi"), ("b", "Hi"), ("a", "Write to x@y.org"), ("b", "ok"))
    path = tmp_path / "chats.whl"
    with zipfile.ZipFile(path, "w") as archive:
        chats = {"1": good, "2": mail, "3": chat(("a", "Hi"), ("b", "Bye"))}
        archive.writestr("chitchat_dataset/dataset.json", json.dumps(chats))
    (turns,) = conversations(path)
    assert [turn.role for turn in turns] == ["user", "assistant", "user", "assistant"]
    assert [turn.content for turn in turns] == ["Hi\nhow are you?", "I'm fine", "Nice", "Yes"]


def test_a_source_with_other_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"not it")
    with pytest.raises(KimiError, match="is not x 1.0"):
        Source("x", "1.0", "x.whl", "0" * 64, "MIT").fetch(tmp_path)
