"""Who holds which page of the KV cache: block ids and reference counts, nothing else.

A block is free (nobody's), active (one or more references) or cached (kept for reuse, evictable). free + cached +
active = total, always.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockPool:
    """Hands out the `num_blocks` pages of the KV cache, each of `block_size` tokens.

    Every reference that `allocate` or `share` gives is given back to `release` exactly once.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens holds nothing")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(reversed(range(num_blocks)))  # a stack: the page used last is the likeliest in a CPU cache
        self._references = [0] * num_blocks

    @property
    def capacity(self) -> int:
        """How many tokens the whole pool holds."""
        return self.num_blocks * self.block_size

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return 0  # a released block keeps nothing that could be found again

    @property
    def num_active(self) -> int:
        return self.num_blocks - self.num_free - self.num_cached

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, one reference each. Raises ValueError if there are not so many."""
        if not 0 <= count <= self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} free")
        block_ids = [self._free.pop() for _ in range(count)]
        for block_id in block_ids:
            self._references[block_id] = 1
        return block_ids

    def share(self, block_ids: Sequence[int]) -> None:
        """Adds a reference to each block. Raises ValueError at a block that nobody holds."""
        for block_id in block_ids:
            self._check_active(block_id)
            self._references[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Gives one reference to each block back; the last one frees it. Raises ValueError at a block that nobody
        holds, which is a block released twice.
        """
        for block_id in block_ids:
            self._check_active(block_id)
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free.append(block_id)

    def _check_active(self, block_id: int) -> None:
        if not (0 <= block_id < self.num_blocks and self._references[block_id]):
            raise ValueError(f"nobody holds block {block_id}")

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Rebuilds the accounting from the block lists of all owners. Raises RuntimeError where it differs."""
        held = Counter(block_id for block_ids in owners for block_id in block_ids)
        for block_id, references in enumerate(self._references):
            if references != held[block_id]:
                raise RuntimeError(f"block {block_id} counts {references} references, its owners hold {held[block_id]}")
        expected_free = set(range(self.num_blocks)) - set(held)
        if len(self._free) != len(expected_free) or set(self._free) != expected_free:
            raise RuntimeError(f"{len(self._free)} blocks are listed as free, {len(expected_free)} are nobody's")
