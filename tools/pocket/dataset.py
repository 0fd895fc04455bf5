"""Batches of whole documents, each row packed full: cases of the skills, small talk, and pieces of plain text.

What step n gets follows from the seed and n alone, so a run that is continued needs no state of its data.
"""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybrid.chat.message import Message
from hybrid.chat.parser import THINK_END
from hybrid.chat.template import DEFAULT_SYSTEM, DEFAULT_TEMPLATE, ChatTemplate
from hybrid.chat.tokenizer import Tokenizer
from hybrid.evaluation.case import Case, prompt_ids, reply_ids
from hybrid.evaluation.skills import draw
from pocket.smalltalk import TALK

TEXT_FILE, HELD_OUT_FILE = "text.npy", "heldout.npy"
# Of about a hundred conversations. The skills with long documents and those that need practice have more of the tokens.
SHARES = {
    "arithmetic": 8,
    "arithmetic_instant": 5,
    "copy": 5,
    "count": 7,
    "sort": 4,
    "lookup": 14,
    "tool_call": 6,
    "tool_multi": 3,
    "tool_refusal": 7,
    "manners": 1,
    "name_recall": 2,
    "tool_result": 2,
    "second_question": 2,
    "lookup_chat": 8,
    "pairs": 13,
    "present": 8,
    "running": 5,
}
# Before anything else: to find a word again, which most of the others rest on.
FIRST_STEPS = 1000
FIRST_SHARES = {
    "lookup": 25,
    "lookup_chat": 5,
    "pairs": 30,
    "present": 10,
    "count": 10,
    "running": 10,
    "tool_refusal": 5,
    "tool_call": 5,
}
# Fewer drills, more of what is asked in the end.
MORE_SHARES = {
    **SHARES,
    "arithmetic": 13,
    "arithmetic_instant": 6,
    "copy": 10,
    "count": 9,
    "sort": 6,
    "lookup": 17,
    "tool_call": 8,
    "tool_multi": 4,
    "lookup_chat": 6,
    "pairs": 5,
    "present": 2,
    "running": 1,
}
# By then words next to each other are found, but not those that a sentence keeps apart.
FACTS_SHARES = {
    **SHARES,
    "arithmetic": 6,
    "arithmetic_instant": 4,
    "copy": 4,
    "count": 4,
    "sort": 2,
    "lookup": 17,
    "tool_call": 12,
    "name_recall": 1,
    "tool_result": 1,
    "second_question": 1,
    "lookup_chat": 6,
    "facts": 22,
    "pairs": 2,
    "present": 5,
    "running": 2,
}
NEARLY_SHARES = {
    **SHARES,
    "arithmetic": 9,
    "arithmetic_instant": 7,
    "copy": 7,
    "sort": 5,
    "lookup": 18,
    "tool_call": 13,
    "tool_multi": 4,
    "tool_result": 1,
    "second_question": 1,
    "lookup_chat": 5,
    "facts": 8,
    "pairs": 1,
    "present": 3,
    "running": 1,
}
ALMOST_SHARES = {
    **NEARLY_SHARES,
    "arithmetic": 8,
    "arithmetic_instant": 5,
    "count": 6,
    "sort": 4,
    "lookup": 22,
    "tool_call": 10,
    "tool_multi": 3,
    "name_recall": 1,
    "facts": 15,
    "present": 2,
}
# Who has something was still found in half of the texts only, what somebody has in all.
LAST_SHARES = {
    **ALMOST_SHARES,
    "arithmetic": 7,
    "copy": 9,
    "sort": 9,
    "lookup": 10,
    "tool_call": 9,
    "tool_refusal": 6,
    "lookup_chat": 4,
    "who": 18,
    "facts": 12,
    "present": 1,
}
# What the steps up to each of these are about; the last, whatever follows.
STAGES = {
    FIRST_STEPS: FIRST_SHARES,
    2000: SHARES,
    4500: MORE_SHARES,
    5500: FACTS_SHARES,
    6018: NEARLY_SHARES,
    6700: ALMOST_SHARES,
    sys.maxsize: LAST_SHARES,
}
PLAIN_ROWS = (
    0.12  # after FIRST_STEPS: rows of nothing but plain text; the ends of the other rows are filled with it, too
)
WITH_SYSTEM = 0.15  # conversations that begin with the usual system prompt
PROMPT_WEIGHT, ANSWER_WEIGHT = 0.0, 1.0
PLAIN_WEIGHT = 0.5  # its loss stays high whatever is learned, and would drown the answers'
SYSTEM = Message("system", DEFAULT_SYSTEM)


class Batch(NamedTuple):
    """Each [rows, length]. `weights` [r, t] is what predicting `ids` [r, t] from its predecessor counts in the loss."""

    ids: Tensor
    positions: Tensor
    documents: Tensor
    weights: Tensor


class Document(NamedTuple):
    ids: Sequence[int]
    weights: Sequence[float]


class Dataset:
    """What `prepare` put into `directory`, mixed with cases made on the spot."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.tokenizer = Tokenizer.from_directory(directory)
        self.template = ChatTemplate(DEFAULT_TEMPLATE)
        self.text = np.load(directory / TEXT_FILE, mmap_mode="r")
        self.seed = seed

    def batch(self, step: int, rows: int, length: int) -> Batch:
        """The same for the same arguments. ids and positions int64, documents int32 (counted within a row; rows are
        full, so none is -1), weights float32."""
        rng = random.Random(f"{self.seed} {step}")
        documents = self._conversations(rng, shares_at(step), length)
        plain = 0.0 if step < FIRST_STEPS else PLAIN_ROWS
        return _stacked([self._row(rng, documents, plain, length) for _ in range(rows)])

    def _row(self, rng: random.Random, documents: "_Queue", plain: float, length: int) -> list[Document]:
        """Conversations as far as they fit, and plain text; of that alone with probability `plain`."""
        row: list[Document] = []
        room = length
        if rng.random() >= plain:
            while document := documents.take(room):
                row.append(document)
                room -= len(document.ids)
        if room:
            row.append(self._plain(rng, room))
        return row

    def _plain(self, rng: random.Random, length: int) -> Document:
        start = rng.randrange(len(self.text) - length)
        ids = self.text[start : start + length].tolist()
        return Document(ids, [0.0] + [PLAIN_WEIGHT] * (length - 1))

    def _conversations(self, rng: random.Random, shares: Mapping[str, int], longest: int) -> "_Queue":
        names, ends = list(shares), list(accumulate(shares.values()))

        def drawn() -> Iterator[Document]:
            while True:
                document = self.document(draw_case(rng.choices(names, cum_weights=ends)[0], rng))
                if len(document.ids) <= longest:
                    yield document

        return _Queue(drawn())

    def document(self, case: Case) -> Document:
        """The conversation and its answer; only answers are to be learned, earlier ones of the conversation too."""
        prompt = prompt_ids(case, self.template, self.tokenizer)
        reply = reply_ids(case, self.template, self.tokenizer)
        return Document(prompt + reply, self._earlier(prompt) + [ANSWER_WEIGHT] * len(reply))

    def _earlier(self, prompt: Sequence[int]) -> list[float]:
        """Weights of a prompt: an earlier answer stands between the end of its reasoning and the end of its turn."""
        begin, end = (self.tokenizer.specials[name] for name in (THINK_END, "<|im_end|>"))
        weights, answering = [], False
        for token in prompt:
            weights.append(ANSWER_WEIGHT if answering else PROMPT_WEIGHT)
            answering = token == begin or (answering and token != end)
        return weights


def shares_at(step: int) -> Mapping[str, int]:
    """What a step's conversations are about."""
    return next(shares for end, shares in STAGES.items() if step < end)


class _Queue:
    """Documents in order, except that one too long for the room there is waits and lets others pass."""

    WAITING = 8

    def __init__(self, documents: Iterator[Document]) -> None:
        self._documents = documents
        self._waiting: list[Document] = []

    def take(self, room: int) -> Document | None:
        """The first that fits into `room` tokens; None if many in a row do not."""
        while len(self._waiting) < self.WAITING:
            self._waiting.append(next(self._documents))
        fits = (index for index, document in enumerate(self._waiting) if len(document.ids) <= room)
        index = next(fits, None)
        return None if index is None else self._waiting.pop(index)


def draw_case(name: str, rng: random.Random) -> Case:
    """A case of a skill, never one that is held out, or of small talk; some begin with a system prompt."""
    case = TALK[name](rng) if name in TALK else draw(name, "train", rng)
    return replace(case, messages=(SYSTEM, *case.messages)) if rng.random() < WITH_SYSTEM else case


def _stacked(rows: list[list[Document]]) -> Batch:
    ids = [[token for document in row for token in document.ids] for row in rows]
    positions = [[position for document in row for position in range(len(document.ids))] for row in rows]
    documents = [[index for index, document in enumerate(row) for _ in document.ids] for row in rows]
    weights = [[weight for document in row for weight in document.weights] for row in rows]
    return Batch(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(documents, dtype=torch.int32),
        torch.tensor(weights, dtype=torch.float32),
    )
