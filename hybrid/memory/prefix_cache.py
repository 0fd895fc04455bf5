"""What was computed stays: pages found by the very ids they hold, and shared by all sequences that begin with them.

A tree: each node is a page, and the way to it from the root spells the ids before it. Full pages are shared as they
are. A page that is not full, or that a sequence has only begun in common with, is copied, or taken over where it goes
on just where that page ends.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hybrid.memory.kv_cache import PAGE_SIZE, KVCache, pages_for

Ids = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """A page with rows for `ids`, as they follow upon those of its parents: a full one, or the last of a sequence."""

    ids: Ids
    page: int
    parent: "Node | None"
    children: dict[Ids, "Node"] = field(default_factory=dict)
    used: int = 0  # the cache's clock when it was last looked for


class Match(NamedTuple):
    """What the cache holds of a sequence: full pages, and the first `rows` rows of one more."""

    full: list[Node]
    part: Node | None
    rows: int


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class PrefixCache:
    """One holder of pages among others: what only it holds goes, least recently used first, as room is needed."""

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv
        self.latest: list[int] = []  # the ids last kept
        self._root = Node((), -1, None)
        self._nodes: set[Node] = set()
        self._clock = 0

    @property
    def count(self) -> int:
        """Of pages held; any thread may ask."""
        return len(self._nodes)

    @property
    def pages(self) -> list[int]:
        """Pages held, in no order."""
        return [node.page for node in self._nodes]

    def find(self, ids: Sequence[int]) -> Match:
        """The longest beginning of `ids` that is held."""
        full = self._follow(ids)
        rest = tuple(ids[len(full) * PAGE_SIZE : (len(full) + 1) * PAGE_SIZE])
        node = full[-1] if full else self._root
        part = max(node.children.values(), key=lambda child: common_prefix(child.ids, rest), default=self._root)
        part.used = self._clock
        rows = common_prefix(part.ids, rest)
        return Match(full, part if rows else None, rows)

    def available(self, match: Match) -> int:
        """Pages that can be had without losing the full ones of `match`."""
        idle = sum(self._is_idle(node) for node in self._nodes)
        return len(self.kv.free) + idle - sum(self._is_idle(node) for node in match.full)

    def open(self, match: Match, tokens: int) -> tuple[list[int], int]:
        """Pages for `tokens` tokens that begin with `match`, and how many rows they hold already.

        The caller has made sure that enough are `available`, and releases the pages or gives them to `keep`.
        """
        pages = [node.page for node in match.full]
        for page in pages:
            self.kv.hold(page)
        part, rows = match.part, len(pages) * PAGE_SIZE + match.rows
        if part is not None and len(part.ids) == match.rows:
            self.kv.hold(part.page)
            self._remove(part)
            pages.append(part.page)
        elif part is not None and not self._copy(part, match.rows, pages, tokens):
            rows -= match.rows
        found = self.make_room(pages_for(tokens) - len(pages))
        assert found, "available was not asked"
        self.kv.extend(pages, tokens)
        return pages, rows

    def make_room(self, pages: int) -> bool:
        """Let go of what was used longest ago until `pages` pages are free; False if that is not enough."""
        if len(self.kv.free) >= pages:
            return True
        leaves = [(node.used, node.page, node) for node in self._nodes if not node.children and self._is_idle(node)]
        heapq.heapify(leaves)
        while len(self.kv.free) < pages and leaves:
            node = heapq.heappop(leaves)[2]
            parent = self._remove(node)
            if parent in self._nodes and not parent.children and self._is_idle(parent):
                heapq.heappush(leaves, (parent.used, parent.page, parent))
        return len(self.kv.free) >= pages

    def publish(self, ids: Sequence[int], pages: list[int]) -> Node:
        """Let others find the full pages among `pages`, which hold rows for `ids`; gives the node of the last.

        Where the cache has a page for the same ids, that one takes its place in `pages`.
        """
        way = self._follow(ids)
        for index, node in enumerate(way):
            if node.page != pages[index]:
                self.kv.hold(node.page)
                self.kv.drop(pages[index])
                pages[index] = node.page
        node = way[-1] if way else self._root
        for index in range(len(way), len(ids) // PAGE_SIZE):
            node = self._add(node, tuple(ids[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]), pages[index])
        return node

    def keep(self, ids: Sequence[int], pages: list[int]) -> None:
        """Take over the pages of a sequence that ended, the last, partial one too, with rows for `ids`."""
        node = self.publish(ids, pages)
        rest = tuple(ids[len(ids) // PAGE_SIZE * PAGE_SIZE :])
        if rest and not any(known[: len(rest)] == rest for known in node.children):
            self._add(node, rest, pages[len(ids) // PAGE_SIZE])
        self.kv.release(pages)
        self.latest = list(ids)

    def forget(self, ids: Sequence[int], kept: int) -> None:
        """Let go of every page on the way of `ids`, and what follows on it, but for those of the first `kept` ids."""
        way = self._follow(ids)
        full = kept // PAGE_SIZE
        if len(way) < full:
            return
        node = way[full - 1] if full else self._root
        rest = tuple(ids[full * PAGE_SIZE :])
        for child in [child for child in node.children.values() if child.ids == rest[: len(child.ids)]]:
            self._cut(child)

    def clear(self) -> None:
        """Let go of everything."""
        for child in list(self._root.children.values()):
            self._cut(child)
        self.latest = []

    def _follow(self, ids: Sequence[int]) -> list[Node]:
        """The full pages held of `ids`, in order."""
        self._clock += 1
        node, way = self._root, []
        for start in range(0, len(ids) - PAGE_SIZE + 1, PAGE_SIZE):
            child = node.children.get(tuple(ids[start : start + PAGE_SIZE]))
            if child is None:
                break
            child.used = self._clock
            way.append(child)
            node = child
        return way

    def _add(self, parent: Node, ids: Ids, page: int) -> Node:
        """A node for `page`, in place of partial ones that hold the beginning of it."""
        for known in [child for child in parent.children.values() if child.ids == ids[: len(child.ids)]]:
            self._remove(known)
        self.kv.hold(page)
        node = Node(ids, page, parent, used=self._clock)
        parent.children[ids] = node
        self._nodes.add(node)
        return node

    def _remove(self, node: Node) -> Node:
        """Let go of a page that none follows; gives its parent."""
        assert node.parent is not None and not node.children
        del node.parent.children[node.ids]
        self._nodes.remove(node)
        self.kv.drop(node.page)
        return node.parent

    def _cut(self, node: Node) -> None:
        """Remove `node` and all below it, without recursion: a long context is a deep tree."""
        below = [node]
        for each in below:
            below += each.children.values()
        for each in reversed(below):
            self._remove(each)

    def _copy(self, source: Node, rows: int, pages: list[int], tokens: int) -> bool:
        """Append a page with the first `rows` rows of `source`, unless that one has to go for lack of room."""
        self.kv.hold(source.page)
        fits = self.make_room(pages_for(tokens) - len(pages))
        if fits:
            self.kv.extend(pages, (len(pages) + 1) * PAGE_SIZE)
            self.kv.copy(source.page, pages[-1], rows)
        self.kv.drop(source.page)
        return fits

    def _is_idle(self, node: Node) -> bool:
        """Whether nobody else holds the page."""
        return self.kv.holders[node.page] == 1
