"""What `compare` and `calibrate` share: models by name, texts cut into windows of tokens, a line of progress."""

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
    from hybrid.checkpoint import Checkpoint
    from hybrid.progress import OnProgress, Progress

DEMO = "demo"
DEFAULT_CTX = 512
STAGES = {
    "demo": "Building the demo model (first run only)",
    "compare": "Comparing",
    "logits": "Comparing answers",
    "calibrate": "Calibrating",
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
    from cli.opening import waiting

    with waiting("Starting") as status:

        def report(progress: Progress) -> None:
            if status is not None:
                label = STAGES.get(progress.stage, progress.stage)
                status.show(label, replace(progress, unit="") if progress.stage == "demo" else progress)

        yield report


def open_model(name: str, report: OnProgress) -> Checkpoint:
    """The checkpoint in a directory; "demo" is the demo model, unless a directory of that name is here."""
    from hybrid.checkpoint import open_checkpoint
    from hybrid.demo import demo_path
    from hybrid.progress import Progress

    if name == DEMO and not Path(name).exists():
        return open_checkpoint(demo_path(lambda done, total, text: report(Progress("demo", done, total, text))))
    return open_checkpoint(name)


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


def windows_of(checkpoint: Checkpoint, texts: list[str], ctx: int | None, tokens: int | None) -> list[list[int]]:
    """The texts as windows of ids in the vocabulary of `checkpoint`; see `cut`. Raises UsageError for a long `ctx`."""
    from hybrid.chat.tokenizer import Tokenizer

    ctx, limit = ctx or DEFAULT_CTX, checkpoint.config.max_position_embeddings
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
