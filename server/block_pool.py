"""Who holds which page of the KV cache: block ids, reference counts and what the blocks hold, nothing else.

A block is free (nobody's), active (one or more references) or cached (nobody's, but it holds tokens that can be found
again). free + cached + active = total, always.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from pagestream.server.prefix_tree import CachedPrefix, FullPage, PrefixTree, Watcher


class BlockPool:
    """Hands out the `num_blocks` pages of the KV cache, each of `block_size` tokens.

    Every reference that `allocate` or `share` gives is given back to `release` exactly once. Who holds a page that can
    be found holds all that precede it too, and they are released last page first. So of the cached blocks, the one
    released the longest ago is followed by none, and it is the next to be evicted.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens holds nothing")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._free = list(reversed(range(num_blocks)))  # a stack: the page used last is the likeliest in a CPU cache
        self._cached: OrderedDict[int, None] = OrderedDict()  # the one released the longest ago first
        self._references = [0] * num_blocks
        self._tree = PrefixTree(block_size)
        self.num_references = 0
        self.num_evictions_total = 0

    @property
    def capacity(self) -> int:
        """How many tokens the whole pool holds."""
        return self.num_blocks * self.block_size

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_active(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_available(self) -> int:
        """How many blocks can be allocated."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_references_to(self, block_id: int) -> int:
        return self._references[block_id]

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks, one reference each; evicts cached ones if too few are free. Raises ValueError if there
        are not so many.
        """
        if not 0 <= count <= self.num_available:
            raise ValueError(f"{count} blocks asked for, {self.num_available} available")
        while len(self._free) < count:
            self._evict()
        block_ids = [self._free.pop() for _ in range(count)]
        for block_id in block_ids:
            self._references[block_id] = 1
        self.num_references += count
        return block_ids

    def share(self, block_ids: Sequence[int]) -> None:
        """Adds a reference to each block. Raises ValueError at a free one."""
        for block_id in block_ids:
            if block_id not in self._cached:
                self._check_active(block_id)
            self._cached.pop(block_id, None)
            self._references[block_id] += 1
            self.num_references += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Gives one reference to each block back, from the last to the first. The last reference makes a block cached
        if it can be found, else free. Raises ValueError at a block that nobody holds, which is a block released twice.
        """
        for block_id in reversed(block_ids):
            self._check_active(block_id)
            self._references[block_id] -= 1
            self.num_references -= 1
            if self._references[block_id] == 0:
                if block_id in self._tree:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)

    def find(self, salt: str, tokens: Sequence[int], limit: int, known: Sequence[int] = ()) -> CachedPrefix:
        """The blocks, active or cached, that hold `tokens[:limit]` from where `known` ends. They are not held yet."""
        return self._tree.find(salt, tokens, limit, known) if self._prefix_cache else CachedPrefix([])

    def keep(self, salt: str, tokens: Sequence[int], block_ids: list[int], start: int, end: int) -> None:
        """Has `block_ids`, which the caller holds, found from now on for `tokens[start:end]`; what precedes them was
        kept before. A full page that is already there takes the place of the caller's own, in the list.
        """
        if not self._prefix_cache:
            return
        for index in range(start // self.block_size, self.blocks_for(end)):
            page = tuple(tokens[index * self.block_size : min((index + 1) * self.block_size, end)])
            own = block_ids[index]
            kept = self._tree.insert(salt, block_ids[index - 1] if index else None, page, own)
            if kept != own and len(page) == self.block_size:
                self.share([kept])
                self.release([own])
                block_ids[index] = kept

    def watch(self, watcher: Watcher | None) -> None:
        """Has it told of what can be found and no longer can, in full pages; None ends that."""
        self._tree.watcher = watcher

    def full_pages(self, salt: str) -> list[FullPage]:
        """What can be found now, in full pages."""
        return list(self._tree.full_pages(salt))

    def flush(self) -> int:
        """Forgets all that nobody holds. Returns how many blocks are free then."""
        while self._cached:
            self._evict()
        return self.num_free

    def _evict(self) -> None:
        block_id, _ = self._cached.popitem(last=False)
        self._tree.remove(block_id)
        self._free.append(block_id)
        self.num_evictions_total += 1

    def _check_active(self, block_id: int) -> None:
        if not (0 <= block_id < self.num_blocks and self._references[block_id]):
            raise ValueError(f"nobody holds block {block_id}")

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Rebuilds the accounting from the block lists of all owners. Raises RuntimeError where it differs."""
        held = Counter(block_id for block_ids in owners for block_id in block_ids)
        for block_id, references in enumerate(self._references):
            if references != held[block_id]:
                raise RuntimeError(f"block {block_id} counts {references} references, its owners hold {held[block_id]}")
        if self.num_references != held.total():
            raise RuntimeError(f"{self.num_references} references are counted, {held.total()} are held")
        expected_free = set(range(self.num_blocks)) - set(held) - set(self._cached)
        if len(self._free) != len(expected_free) or set(self._free) != expected_free:
            raise RuntimeError(f"{len(self._free)} blocks are listed as free, {len(expected_free)} are nobody's")
        if any(block_id not in self._tree for block_id in self._cached):
            raise RuntimeError("a cached block cannot be found")
