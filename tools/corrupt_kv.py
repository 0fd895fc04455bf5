"""Damage kept rows in every way and see that no answer changes: `python tools/corrupt_kv.py [MODEL] --count 1000`.

A prompt is computed, its files are kept. Then, again and again: one thing at random happens to them, the program is as
if newly started, and the same prompt must give the same ids, from rows that are bit for bit those written; what was
damaged must be gone afterwards. Everything is float32, so that answers do not depend on how much is computed anew.
Without MODEL a tiny random one. The last line is one JSON object; ends with 1 if anything was different.
"""

import argparse
import json
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid import Kimi, SamplingParams
from hybrid.checkpoint.tiny import make_tiny
from hybrid.engine.request import Request
from hybrid.errors import KimiError
from hybrid.memory.disk_kv import DiskKV
from hybrid.memory.kv_cache import PAGE_SIZE
from hybrid.memory.kv_files import BLOCK_PAGES, HEADER_BYTES, BlockFiles, decode, encode

MODEL, ROOM = bytes(range(32)), 1 << 30
PAGES = BLOCK_PAGES + 3  # of the prompt: a whole block and the beginning of another

Damage = Callable[[Path, random.Random], None]


# -- what may happen to a file ----------------------------------------------------------------------------------------
def flip_byte(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    path.write_bytes(content)


def flip_in_header(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(HEADER_BYTES)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def overwrite(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    stretch = content[start : start + rng.randrange(1, 10_000)]
    content[start : start + len(stretch)] = rng.randbytes(len(stretch))
    path.write_bytes(content)


def tear(path: Path, rng: random.Random) -> None:
    """As a power cut may: zeros from some point on."""
    content = path.read_bytes()
    whole = rng.randrange(len(content))
    path.write_bytes(content[:whole] + bytes(len(content) - whole))


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def lengthen(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 5000)))


def swap_pages(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    size = decode(content[:HEADER_BYTES], MODEL).page_bytes
    head, first, second, rest = (
        content[:HEADER_BYTES],
        content[HEADER_BYTES : HEADER_BYTES + size],
        content[HEADER_BYTES + size : HEADER_BYTES + 2 * size],
        content[HEADER_BYTES + 2 * size :],
    )
    path.write_bytes(head + second + first + rest)


def take_others_name(path: Path, rng: random.Random) -> None:
    other = rng.choice([each for each in path.parent.iterdir() if each != path])
    other.write_bytes(path.read_bytes())


def rename(path: Path, rng: random.Random) -> None:
    path.rename(path.with_name(rng.choice(["x", f"{rng.randbytes(16).hex()}-{path.name[33:]}", f"{path.name}.kv"])))


def relabel(path: Path, rng: random.Random) -> None:
    """Of another model, and otherwise whole."""
    content = path.read_bytes()
    path.write_bytes(encode(decode(content[:HEADER_BYTES], MODEL), rng.randbytes(32)) + content[HEADER_BYTES:])


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


DAMAGES: tuple[Damage, ...] = (
    flip_byte, flip_in_header, overwrite, tear, truncate, lengthen, swap_pages, take_others_name, rename, relabel,
    remove,
)  # fmt: skip


# -- what comes of it -------------------------------------------------------------------------------------------------
class Trial:
    """A model whose program is started again and again, and what it did before any damage."""

    def __init__(self, kimi: Kimi, root: Path, new_tokens: int, seed: int) -> None:
        self._engine, self._root = kimi._engine, root
        self._params = SamplingParams(temperature=0, max_tokens=new_tokens)
        rng = random.Random(seed)
        self._prompt = [rng.randrange(kimi.config.vocab_size - 256) for _ in range(PAGES * PAGE_SIZE + 1)]
        self.ids, _ = self.answer()
        self._rows = self._held(PAGES)
        self.files = {path: path.read_bytes() for path in sorted(self._directory.iterdir())}
        assert len(self.files) == 2, "a whole block and the beginning of another"

    def answer(self) -> tuple[list[int], int]:
        """The ids that a new program gives, and how many tokens it had from the disk."""
        engine = self._engine
        engine.forget()
        page_bytes = engine.kv.rows[:, :PAGE_SIZE].nbytes
        files = BlockFiles(self._root, MODEL, page_bytes, ROOM)
        self._directory = files.directory
        engine.disk = DiskKV(files, engine.kv)
        request = Request(list(self._prompt), self._params)
        ids: list[int] = []
        with suppress(KimiError):  # rows may be no numbers, which is one way of being wrong
            ids += engine.stream(request)
        engine.close()
        return ids, request.disk_tokens

    def restore(self) -> None:
        """The files as they were written."""
        for path in self._directory.iterdir():
            path.unlink()
        for path, content in self.files.items():
            path.write_bytes(content)

    def after(self, damage: Damage, rng: random.Random) -> tuple[bool, bool, bool, int]:
        """Whether ids, rows from the disk and the files in the end are what they should be; and the tokens reused."""
        self.restore()
        damage(rng.choice(list(self.files)), rng)
        ids, reused = self.answer()
        pages = reused // PAGE_SIZE
        same_rows = torch.equal(self._held(pages), self._rows[:, : pages * PAGE_SIZE])
        return ids == self.ids, same_rows, self._are_sound(), reused

    def _held(self, pages: int) -> Tensor:
        """[layers, tokens, latent_dim]: the first rows of the prompt in the cache."""
        engine = self._engine
        found = tuple(node.page for node in engine.cache.find(self._prompt).full[:pages])
        if not found:
            return engine.kv.rows[:, :0]
        return torch.stack([engine.kv.read(at, found, len(found) * PAGE_SIZE) for at in range(len(engine.kv.rows))])

    def _are_sound(self) -> bool:
        """Whether a program started now would read the whole prompt: what was damaged is gone and written again."""
        names = {path.name for path in self._directory.iterdir()}
        return names == {path.name for path in self.files} and self.answer()[1] == PAGES * PAGE_SIZE


def run(model: Path, count: int, *, new_tokens: int = 4, seed: int = 0) -> dict[str, Any]:
    """`count` trials."""
    rng = random.Random(seed)
    kinds, wrong, reused = Counter[str](), Counter[str](ids=0, rows=0, files=0), Counter[int]()
    exact = {"dtype": "float32", "activations": "float32"}
    with tempfile.TemporaryDirectory() as root, Kimi.load(model, ctx=(PAGES + 2) * PAGE_SIZE, **exact) as kimi:
        trial = Trial(kimi, Path(root), new_tokens, seed)
        for number in range(count):
            damage = DAMAGES[number % len(DAMAGES)]
            *fine, tokens = trial.after(damage, rng)
            kinds[damage.__name__] += 1
            reused[tokens] += 1
            wrong.update({name for name, good in zip(wrong, fine, strict=True) if not good})
            if number % 50 == 49:
                print(f"{number + 1} of {count}: {dict(wrong)} wrong", file=sys.stderr, flush=True)
    return {"count": count, "kinds": kinds, "reused": dict(sorted(reused.items())), "wrong": wrong}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=4, help="of the answer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.getLogger("hybrid.memory").setLevel(logging.ERROR)  # every damage is told
    try:
        with tempfile.TemporaryDirectory() as directory:
            model = options.model or make_tiny(Path(directory) / "tiny", config={"num_hidden_layers": 2})
            found = run(model, options.count, new_tokens=options.tokens, seed=options.seed)
    except KimiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(found))
    return 1 if any(found["wrong"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
