"""Which blocks hold which tokens: a tree of pages, each with the tokens it holds, under those that precede them.

A page is found by its tokens and by all that precede it, never by a hash of them, so what is found is what was asked
for. The tree knows no owners: block_pool.py does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """`block_ids` hold the tokens asked for, page by page; the first `num_copyable` slots of `copy_from` hold those
    that come next, though not all of a page.
    """

    block_ids: list[int]
    copy_from: int = -1
    num_copyable: int = 0


@dataclass(frozen=True, slots=True)
class FullPage:
    """A full page of the tree, as those who watch it see it."""

    number: int  # unique for the tree's life, unlike a block id
    parent: int | None  # the number of the page before it
    tokens: tuple[int, ...]


class Watcher(Protocol):
    """Is told of full pages as they come and go."""

    def stored(self, salt: str, page: FullPage) -> None: ...

    def removed(self, salt: str, number: int) -> None: ...


@dataclass(slots=True, eq=False)
class _Page:
    tokens: tuple[int, ...]  # fewer than fill a page only where none follows
    block_id: int
    parent: _Page | None
    salt: str
    number: int = 0
    children: list[_Page] = field(default_factory=list)  # sorted by tokens


class PrefixTree:
    """One tree for each salt: what is kept under one is never found under another.

    A page is removed after all that follow it.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._roots: dict[str, _Page] = {}
        self._pages: dict[int, _Page] = {}  # by block id
        self._last_number = 0
        self.watcher: Watcher | None = None

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._pages

    def __len__(self) -> int:
        return len(self._pages)

    def find(self, salt: str, tokens: Sequence[int], limit: int, known: Sequence[int] = ()) -> CachedPrefix:
        """What holds `tokens[:limit]` from where `known` ends, which are the full pages of their beginning."""
        page = self._pages[known[-1]] if known else self._roots.get(salt)
        block_ids: list[int] = []
        while page is not None:
            start = (len(known) + len(block_ids)) * self._block_size
            wanted = tuple(tokens[start : min(start + self._block_size, limit)])
            nearest, common = _nearest(page.children, wanted)
            if nearest is None or common < self._block_size:
                return CachedPrefix(block_ids, nearest.block_id, common) if nearest else CachedPrefix(block_ids)
            block_ids.append(nearest.block_id)
            page = nearest
        return CachedPrefix(block_ids)

    def insert(self, salt: str, before: int | None, tokens: tuple[int, ...], block_id: int) -> int:
        """Keeps `tokens`, at most a page, in `block_id` behind the full page `before`. Returns the block that holds
        them from now on: another one if it already did. A block whose page has grown is inserted again.
        """
        if block_id in self._pages:
            self._detach(self._pages.pop(block_id))
        parent = self._roots.setdefault(salt, _Page((), -1, None, salt)) if before is None else self._pages[before]
        nearest, common = _nearest(parent.children, tokens)
        if nearest is not None and common == len(tokens):
            return nearest.block_id
        self._last_number += 1
        page = self._pages[block_id] = _Page(tokens, block_id, parent, salt, self._last_number)
        parent.children.insert(_place(parent.children, tokens), page)
        if self.watcher is not None and len(tokens) == self._block_size:
            self.watcher.stored(salt, _seen(page))
        return block_id

    def full_pages(self, salt: str) -> Iterator[FullPage]:
        """All that are kept under one salt, each after the one before it."""
        left = list(self._roots[salt].children) if salt in self._roots else []
        while left:
            page = left.pop()
            if len(page.tokens) == self._block_size:
                yield _seen(page)
            left += page.children

    def remove(self, block_id: int) -> None:
        """Raises RuntimeError if pages follow it."""
        page = self._pages.pop(block_id)
        if page.children:
            raise RuntimeError(f"block {block_id} is removed before {len(page.children)} pages that follow it")
        self._detach(page)
        if self.watcher is not None and len(page.tokens) == self._block_size:
            self.watcher.removed(page.salt, page.number)
        if page.parent is not None and page.parent.parent is None and not page.parent.children:
            self._roots = {salt: root for salt, root in self._roots.items() if root.children}

    @staticmethod
    def _detach(page: _Page) -> None:
        if page.parent is not None:
            del page.parent.children[_place(page.parent.children, page.tokens)]


def _seen(page: _Page) -> FullPage:
    before = page.parent.number if page.parent is not None and page.parent.parent is not None else None
    return FullPage(page.number, before, page.tokens)


def _place(pages: list[_Page], tokens: tuple[int, ...]) -> int:
    return bisect_left(pages, tokens, key=lambda page: page.tokens)


def _nearest(pages: list[_Page], tokens: tuple[int, ...]) -> tuple[_Page | None, int]:
    """The page that begins with the most of `tokens`, and how many: sorted, it is next to their place."""
    place = _place(pages, tokens)
    best, most = None, 0
    for page in pages[max(place - 1, 0) : place + 1]:
        common = _common(page.tokens, tokens)
        if common > most:
            best, most = page, common
    return best, most


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common beginning."""
    if a == b:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
