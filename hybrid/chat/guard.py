"""Foreign text on its way through a template, disguised so that no part of it can pass for a control token.

Letters are replaced one for one by private letters that occur nowhere else, so lengths and slices stay true:
- every letter that begins or ends the name of a special token ("<", ">", "[", "]"): whatever the template cuts and
  joins, such a name then needs both its ends from the template;
- every letter of a text that could fill the middle of a name, as EOS does in "[" ~ name ~ "]".
After the rendering is split at the special tokens, `revealed` brings the letters back.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from hybrid.chat.tools import MAX_DEPTH
from hybrid.errors import KimiError

# Values that templates compare with words of their own, under these keys; no foreign text.
STRUCTURE = {
    "role": {"system", "user", "assistant", "tool", "developer"},
    "type": {"function", "text", "image", "image_url", "video", "video_url"},
}
PRIVATE = range(0xF0000, 0xFFFFE)  # Unicode's plane 15


class _Names(NamedTuple):
    """What of the names of special tokens every disguise needs."""

    folded: list[str]  # whatever their case
    longest: int
    letters: list[str]  # all of them, in either case, in order
    ends: set[str]


@lru_cache(maxsize=4)  # a tokenizer's names are those of every conversation
def _known(names: tuple[str, ...]) -> _Names:
    folded = [name.casefold() for name in names]
    letters = {letter for name in names for letter in name + name.lower() + name.upper()}
    ends = {letter for name in names for letter in (name[0], name[-1])}
    return _Names(folded, max(map(len, folded), default=0), sorted(letters), ends)


class Guard:
    """Disguises for the texts in `foreign`, given the `names` that a template may write."""

    def __init__(self, names: Sequence[str], foreign: Any) -> None:
        self._names = _known(tuple(names))
        used = _letters(foreign)
        unused = (letter for letter in map(chr, PRIVATE) if letter not in used)
        disguises = dict(zip(self._names.letters, unused, strict=False))
        self._all = {ord(letter): disguise for letter, disguise in disguises.items()}
        self._ends = {ord(letter): disguises[letter] for letter in self._names.ends}
        self.revealed = {ord(disguise): letter for letter, disguise in disguises.items()}

    def disguise(self, value: Any, key: str = "") -> Any:
        """`value`, which stands under `key`, with every text in it disguised at any depth, keys included."""
        if isinstance(value, str):
            return self._disguise_text(value, key)
        if isinstance(value, Mapping):
            return {str(k).translate(self._ends): self.disguise(item, k) for k, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.disguise(item) for item in value]
        return value

    def _disguise_text(self, text: str, key: str) -> str:
        if text in STRUCTURE.get(key, ()):
            return text
        core = text.strip().casefold()
        in_a_name = 0 < len(core) < self._names.longest and any(core in name for name in self._names.folded)
        return text.translate(self._all if in_a_name else self._ends)


def _letters(value: Any, depth: int = 0) -> set[str]:
    """Every letter of every text in `value`. Raises KimiError past MAX_DEPTH levels."""
    if depth > MAX_DEPTH:
        raise KimiError(f"A message nests deeper than {MAX_DEPTH} levels.", "Send the value as JSON text instead.")
    if isinstance(value, str):
        return set(value)
    if isinstance(value, Mapping):
        value = [*map(str, value), *value.values()]
    if isinstance(value, list | tuple):
        return set().union(*(_letters(item, depth + 1) for item in value))
    return set()
