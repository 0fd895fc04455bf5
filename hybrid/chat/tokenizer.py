"""Kimi's byte-level BPE vocabulary: text <-> token ids.

A vocabulary of n ranks (tiktoken.model) is followed by 256 special tokens at ids n .. n+255, named in
tokenizer_config.json. Text never becomes a special token here: `encode` treats their names as ordinary text, and only
`encode_prompt`, which is for text that a chat template wrote, knows them.
"""

import base64
import binascii
import codecs
import json
import os.path
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, count
from pathlib import Path
from typing import Any

from hybrid.errors import CheckpointError

MODEL_FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"
NUM_SPECIALS = 256
STOP_NAMES = ("<|im_end|>", "[EOS]", "[EOT]")

# Offset behind the last rank -> (name, special). Names with special=False stay in text decoded for people.
KIMI_SPECIALS: dict[int, tuple[str, bool]] = {
    0: ("[BOS]", True),
    1: ("[EOS]", True),
    2: ("<|im_end|>", True),
    3: ("<|im_user|>", True),
    4: ("<|im_assistant|>", True),
    6: ("<|start_header_id|>", True),
    7: ("<|end_header_id|>", True),
    9: ("[EOT]", True),
    10: ("<|im_system|>", True),
    11: ("<|tool_calls_section_begin|>", False),
    12: ("<|tool_calls_section_end|>", False),
    13: ("<|tool_call_begin|>", False),
    14: ("<|tool_call_argument_begin|>", False),
    15: ("<|tool_call_end|>", False),
    17: ("<|im_middle|>", True),
    18: ("<|media_begin|>", True),
    19: ("<|media_content|>", True),
    20: ("<|media_end|>", True),
    21: ("<|media_pad|>", True),
    22: ("<think>", False),
    23: ("</think>", False),
    254: ("[UNK]", True),
    255: ("[PAD]", True),
}

# The pieces that BPE merges within, in order of preference: Han, words (lower or title case, then upper case), numbers,
# punctuation, line ends, blanks. `&&` intersects character classes; Python's `re` knows neither it nor \p.
SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# Longer texts are cut before splitting, as the model's own tokenizer does; the cuts are part of its definition.
MAX_CHARS = 400_000
MAX_RUN = 25_000
RUNS = re.compile(r"\s+|\S+")


class Tokenizer:
    """`ranks[i]` is the text of token i; `names` maps special ids to (name, special)."""

    def __init__(
        self, ranks: Sequence[bytes], names: Mapping[int, tuple[str, bool]], stop_ids: Iterable[int] = ()
    ) -> None:
        from tiktoken import Encoding  # late: who only writes vocabularies need not load it

        merges = {token: rank for rank, token in enumerate(ranks)}
        self._bpe = Encoding("kimi", pat_str=SPLIT_PATTERN, mergeable_ranks=merges, special_tokens={})
        ids = range(len(ranks), len(ranks) + NUM_SPECIALS)
        slots = [names.get(i, (reserved_name(i), True)) for i in ids]
        self.specials: dict[str, int] = {name: i for i, (name, _) in zip(ids, slots, strict=True)}
        self.vocab_size = len(ranks) + NUM_SPECIALS
        self.stop_ids = frozenset(stop_ids) | {self.specials[name] for name in STOP_NAMES if name in self.specials}
        self._first_special = len(ranks)
        self._texts = [*ranks, *(name.encode() for name, _ in slots)]
        self._hidden = frozenset(i for i, (_, special) in zip(ids, slots, strict=True) if special)
        # What a template may write, longer names first. Names that begin or end like words cannot be told from text.
        self.prompt_specials = sorted(filter(_recognisable, self.specials), key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, self.prompt_specials)) + ")")

    @classmethod
    def from_directory(cls, path: str | Path, *, eos_ids: Iterable[int] = ()) -> "Tokenizer":
        """Read tiktoken.model and tokenizer_config.json (Kimi's names where it has none).

        `eos_ids` (of config.json, say) join the stop ids. Raises CheckpointError for missing or damaged files.
        """
        directory = Path(path)
        ranks = _read_ranks(directory / MODEL_FILE)
        config = read_config(directory)
        return cls(ranks, _special_names(config, len(ranks), directory), eos_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; the names of special tokens in it are ordinary text."""
        return [token for piece in _cut(text) for token in self._bpe.encode_ordinary(piece)]

    def encode_prompt(self, text: str, restore: Mapping[int, str] | None = None) -> list[int]:
        """Ids of text written by a template: names of special tokens in it become those tokens.

        What stands between them passes through `str.translate(restore)` and is encoded as ordinary text, so disguised
        letters come back only when nothing can mistake them any more.
        """
        ids: list[int] = []
        for index, piece in enumerate(self._special_pattern.split(text)):
            if index % 2:
                ids.append(self.specials[piece])
            else:
                ids += self.encode(piece.translate(restore) if restore else piece)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`, U+FFFD for broken UTF-8. `skip_special` leaves out control tokens, but not think and tool
        tags (special=False in tokenizer_config.json)."""
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token: int, skip_special: bool = True) -> bytes:
        """The bytes of one token; a model may know more ids than its vocabulary, those have names only."""
        if token >= self.vocab_size:
            return b"" if skip_special else reserved_name(token).encode()
        return b"" if skip_special and token in self._hidden else self._texts[token]

    def special_name(self, token: int) -> str | None:
        """The name of a special token (or of an id beyond the vocabulary); None for a token of text."""
        if token < self._first_special:
            return None
        return self._texts[token].decode() if token < self.vocab_size else reserved_name(token)

    def reuse(self, prompt: Sequence[int], seen: Sequence[int]) -> list[int]:
        """`prompt`, spelled with the ids of `seen` as far as both say the same.

        A model may have written a text in other tokens than `encode` would choose. Put back into a prompt in its own
        tokens, an answer matches what the cache holds, and the model sees what it really wrote.
        """
        ours, theirs = ([self._spelling(i) for i in ids] for ids in (prompt, seen))
        same = len(os.path.commonprefix([b"".join(ours), b"".join(theirs)]))
        ends, seen_ends = (dict(zip(accumulate(map(len, texts)), count(1), strict=False)) for texts in (ours, theirs))
        at = max((end for end in ends.keys() & seen_ends.keys() if end <= same), default=0)
        return [*seen[: seen_ends.get(at, 0)], *prompt[ends.get(at, 0) :]]

    def _spelling(self, token: int) -> bytes:
        """Bytes that tell tokens of text by their text and special ones by their name: 0xFF never occurs in UTF-8."""
        name = self.special_name(token)
        return self._texts[token] if name is None else b"\xff" + name.encode()

    def stream_decoder(self, skip_special: bool = True) -> "StreamDecoder":
        return StreamDecoder(self, skip_special)


class StreamDecoder:
    """Tokens to text, one at a time: the bytes of a character that is not complete yet are held back."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that became complete with `token`, often one word, sometimes nothing."""
        return self._utf8.decode(self._tokenizer.token_bytes(token, self._skip_special))

    def flush(self) -> str:
        """U+FFFD if the text ends in the middle of a character, else nothing; then as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def reserved_name(token: int) -> str:
    """The name of a special token that has no other."""
    return f"<|reserved_token_{token}|>"


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, {} if there is none. Raises CheckpointError if it is no JSON object."""
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(config, dict):
        raise _damaged(path, "not a JSON object")
    return config


def write_tokenizer(directory: Path, ranks: Sequence[bytes]) -> None:
    """Write tiktoken.model (token i is `ranks[i]`; all 256 single bytes must be among them) and tokenizer_config.json.

    Kimi's specials follow at ids len(ranks) + offset, so the vocabulary has len(ranks) + 256 ids.
    """
    assert len(set(ranks)) == len(ranks), "every token appears once"
    assert {bytes([byte]) for byte in range(256)} <= set(ranks), "every single byte is a token"
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(ranks))
    (directory / MODEL_FILE).write_bytes(b"".join(lines))
    config = tokenizer_config(len(ranks))
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_config(num_ranks: int) -> dict[str, object]:
    """tokenizer_config.json of a vocabulary of `num_ranks` ordinary tokens, with Kimi's specials behind them."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(num_ranks + offset): {"content": name, **flags, "special": special}
        for offset, (name, special) in KIMI_SPECIALS.items()
    }
    roles = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    others = [name for name, special in KIMI_SPECIALS.values() if special and name not in roles.values()]
    return {
        "added_tokens_decoder": added,
        "additional_special_tokens": others,
        **roles,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
        "tokenizer_class": "TikTokenTokenizer",
    }


def _read_ranks(path: Path) -> list[bytes]:
    """The tokens of tiktoken.model, lines of "<base64> <rank>" with ranks 0, 1, 2, ... in order."""
    try:
        words = path.read_bytes().split()
    except FileNotFoundError as error:
        remedy = "Point at a checkpoint directory that holds one, or download it again."
        raise CheckpointError(f"There is no {path}.", remedy) from error
    except OSError as error:
        raise _damaged(path, str(error)) from error
    try:
        tokens = [binascii.a2b_base64(word, strict_mode=True) for word in words[::2]]
        in_order = [int(word) for word in words[1::2]] == list(range(len(tokens)))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not in_order:
        raise _damaged(path, "its ranks are not 0, 1, 2, ...")
    if len(set(tokens)) < len(tokens) or not {bytes([byte]) for byte in range(256)} <= set(tokens):
        raise _damaged(path, "tokens are missing or appear twice")
    return tokens


def _special_names(config: dict[str, Any], num_ranks: int, directory: Path) -> dict[int, tuple[str, bool]]:
    entries = config.get("added_tokens_decoder")
    if not entries:
        return {num_ranks + offset: name for offset, name in KIMI_SPECIALS.items()}
    try:
        names = {int(i): (str(entry["content"]), bool(entry.get("special", True))) for i, entry in entries.items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _damaged(directory / CONFIG_FILE, "added_tokens_decoder is not a table of tokens") from error
    for token, (name, _) in names.items():
        if not num_ranks <= token < num_ranks + NUM_SPECIALS:
            raise CheckpointError(
                f"{directory / CONFIG_FILE} puts {name} at id {token}, but {MODEL_FILE} has {num_ranks} ranks.",
                "The two files do not belong together, or one is incomplete: download both again.",
            )
    return names


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {why}.", "The file is damaged: download it again.")


def _recognisable(name: str) -> bool:
    return len(name) > 1 and not (name[0].isalnum() or name[-1].isalnum() or name != name.strip())


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most MAX_CHARS letters, in which no run of blanks or of non-blanks is longer than MAX_RUN."""
    for start in range(0, len(text), MAX_CHARS):
        chunk, done = text[start : start + MAX_CHARS], 0
        for run in RUNS.finditer(chunk) if len(chunk) > MAX_RUN else ():
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield chunk[done:cut]
                done = cut
        yield chunk[done:]
