"""The pocket model's tokens: byte-pair merges in which a word of a skill is one token wherever it stands.

" Anna", "Anna" and "Anna's" share the token Anna, so copying a name from a question into an answer or into a call's
arguments is copying a token. The merges that make these words come first; later ones may make longer words of them, but
never join them to a blank or a sign.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from heapq import heappop, heappush
from itertools import islice

import regex

from hybrid.chat.tokenizer import SPLIT_PATTERN

Pair = tuple[bytes, bytes]
PIECES = regex.compile(SPLIT_PATTERN, regex.V1)
LETTERS = regex.compile(rb"[A-Za-z\x80-\xff]+")
RARE = 2  # pieces seen less often teach nothing


def count_pieces(texts: Iterable[str]) -> Counter[str]:
    """How often each of the pieces occurs that merges stay within; numbers are left out, so digits remain single."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(PIECES.findall(text))
    return Counter({piece: n for piece, n in counts.items() if not any(map(str.isnumeric, piece))})


def train_ranks(words: Iterable[str], pieces: Mapping[str, int], size: int) -> list[bytes]:
    """`size` tokens: the single bytes, then merges until each of `words` is one token, then the most frequent ones in
    `pieces`."""
    whole = {word.encode(): 1 for word in sorted(words)}
    ranks = [bytes([byte]) for byte in range(256)]
    ranks += list(_Text(whole).merges(set(ranks), set()))
    text = _Text({piece.encode(): n for piece, n in sorted(pieces.items()) if n >= RARE})
    for token in ranks[256:]:
        text.join(token)
    assert len(ranks) <= size, "the words alone need more tokens"
    ranks += islice(text.merges(set(ranks), set(whole)), size - len(ranks))
    assert len(ranks) == size, f"the text has merges for {len(ranks)} tokens only"
    return ranks


class _Text:
    """Pieces cut into tokens, with the number of times each pair of neighbours occurs."""

    def __init__(self, pieces: Mapping[bytes, int]) -> None:
        self._tokens = [[bytes([byte]) for byte in piece] for piece in pieces]
        self._counts = list(pieces.values())
        self._pairs: Counter[Pair] = Counter()
        self._places: defaultdict[Pair, set[int]] = defaultdict(set)
        self._by_token: defaultdict[bytes, set[Pair]] = defaultdict(set)
        self._queue: list[tuple[int, Pair]] = []  # may be out of date: too high a number, or a pair twice
        for place in range(len(self._tokens)):
            self._count(place, 1)

    def merges(self, known: set[bytes], words: set[bytes]) -> Iterator[bytes]:
        """New tokens, the most frequent first, each joined everywhere before the next is chosen. `words` are never
        joined to signs."""
        while self._queue:
            count, pair = heappop(self._queue)
            now = -self._pairs[pair]
            if now != count:
                if now:
                    heappush(self._queue, (now, pair))
                continue
            token = pair[0] + pair[1]
            if token not in words and not words.isdisjoint(LETTERS.findall(token)):
                continue
            self.join(token)
            if token not in known:
                known.add(token)
                yield token

    def join(self, token: bytes) -> None:
        """Make one token of all neighbours that spell it."""
        for pair in sorted(self._by_token[token]):
            for place in list(self._places[pair]):
                self._count(place, -1)
                self._tokens[place] = _joined(self._tokens[place], pair)
                self._count(place, 1)

    def _count(self, place: int, sign: int) -> None:
        tokens = self._tokens[place]
        for pair in zip(tokens, tokens[1:], strict=False):
            self._pairs[pair] += sign * self._counts[place]
            if sign > 0:
                self._places[pair].add(place)
                self._by_token[pair[0] + pair[1]].add(pair)
                heappush(self._queue, (-self._pairs[pair], pair))
            else:
                self._places[pair].discard(place)


def _joined(tokens: list[bytes], pair: Pair) -> list[bytes]:
    joined: list[bytes] = []
    for token in tokens:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return joined
