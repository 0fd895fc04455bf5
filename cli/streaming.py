"""What `compare`, `calibrate` and `eval` share: models by name, windows of tokens cut from texts, progress."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cli.options import machine, option, parse_tokens
from hybrid.errors import UsageError

if TYPE_CHECKING:
    from hybrid import Kimi
    from hybrid.checkpoint import Checkpoint
    from hybrid.progress import OnProgress, Progress

DEFAULT_CTX = 512
STAGES = {
    "compare": "Comparing",
    "logits": "Comparing answers",
    "calibrate": "Calibrating",
    "skills": "Answering",
    "text": "Reading",
}

_TEXT = "UTF-8 text to run over; may be given several times, and is then taken from in turn."
Text = Annotated[list[Path], option("--text", metavar="FILE", env=False, help=_TEXT)]
Tokens = Annotated[
    int | None, option("--tokens", metavar="N", env=False, parser=parse_tokens, help="Use so many tokens at most.")
]
_CTX = f"Tokens that see each other: the text is cut into windows of this length; {DEFAULT_CTX} by default."
Window = Annotated[int | None, machine("--ctx", metavar="N", env=False, parser=parse_tokens, help=_CTX)]


@contextmanager
def progress_line() -> Iterator[OnProgress]:
    """Reports go to a line on the error stream with the time left; nowhere if that is no terminal."""
    from cli import opening

    labels = opening.STAGES | STAGES
    with opening.waiting("Starting") as status:

        def report(progress: Progress) -> None:
            if status is not None:
                label = labels.get(progress.stage, progress.stage)
                status.show(label, replace(progress, unit="") if progress.stage == "demo" else progress)

        yield report


def open_model(name: str, report: OnProgress) -> Checkpoint:
    """The checkpoint in a directory, or the one that goes by a name: "demo" or "pocket"."""
    from hybrid.checkpoint import open_checkpoint
    from hybrid.names import model_path

    return open_checkpoint(model_path(name, report))


def named_directory(name: str) -> str | Path:
    """The directory of the model that goes by a name, built if it has to be; any other as it is given."""
    from hybrid.names import model_path

    with progress_line() as report:
        return model_path(name, report)


def read_texts(paths: list[Path]) -> list[tuple[str, str]]:
    """(content, sha256 of the file) of every file. Raises UsageError for what is not UTF-8, OSError."""
    texts = []
    for path in paths:
        data = path.expanduser().read_bytes()
        try:
            texts.append((data.decode("utf-8"), hashlib.sha256(data).hexdigest()))
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text.", "Convert it, or name another file.") from error
    return texts


def windows_of(checkpoint: Checkpoint | Kimi, texts: list[str], ctx: int | None, tokens: int | None) -> list[list[int]]:
    """The texts as windows of ids in the vocabulary of `checkpoint`; see `cut`. Raises UsageError for a long `ctx`."""
    from hybrid.chat.tokenizer import Tokenizer

    limit = checkpoint.config.max_position_embeddings
    ctx = ctx or min(DEFAULT_CTX, limit)
    if ctx > limit:
        raise UsageError(f"--ctx {ctx:,} is too long for {checkpoint.path.name}.", f"It takes {limit:,} tokens.")
    tokenizer = Tokenizer.from_directory(checkpoint.path)
    return cut([tokenizer.encode(text) for text in texts], ctx, tokens)


def cut(ids: list[list[int]], ctx: int, tokens: int | None) -> list[list[int]]:
    """Windows of `ctx` ids from the texts in turn, `tokens` ids in all at most; what fills no window is left out.

    Raises UsageError if there is no window at all.
    """
    length = min(ctx, tokens or ctx)
    pieces = [[each[at : at + length] for at in range(0, len(each) - length + 1, length)] for each in ids]
    windows = [window for window in chain.from_iterable(zip_longest(*pieces)) if window is not None]
    if not windows:
        most = max(map(len, ids))
        raise UsageError(
            f"No text has {length:,} tokens; the longest has {most:,}.", "Use more text or a smaller --ctx."
        )
    return windows[: tokens // length if tokens else None]


def require_one_vocabulary(a: Checkpoint, b: Checkpoint) -> None:
    """Raise UsageError unless the same text is the same ids for both, and both choose among the same ids."""
    from hybrid.chat.tokenizer import MODEL_FILE

    sizes = [each.config.vocab_size for each in (a, b)]
    ranks = [(each.path / MODEL_FILE).read_bytes() for each in (a, b)]
    if sizes[0] != sizes[1] or ranks[0] != ranks[1]:
        raise UsageError(
            f"{a.path.name} and {b.path.name} have different vocabularies.",
            "Only models that share one can be compared token by token.",
        )
