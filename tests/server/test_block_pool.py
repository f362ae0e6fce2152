"""Block accounting against a model that only counts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pagestream.server.block_pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Any mixture of allocations, shared references and releases; each holder is a list of block ids."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=7, block_size=4)
        self.holders: list[list[int]] = []
        self.kept: set[tuple[int, ...]] = set()

    @rule(count=st.integers(0, 8))
    def allocate(self, count: int) -> None:
        held = {block_id for holder in self.holders for block_id in holder}
        if count > 7 - len(held):
            with pytest.raises(ValueError, match="available"):
                self.pool.allocate(count)
            return
        block_ids = self.pool.allocate(count)
        assert len(set(block_ids)) == count
        assert set(block_ids) <= set(range(7)) - held
        self.holders.append(block_ids)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def read(self, tokens: list[int]) -> None:
        """As a request does: takes what is found, allocates the rest, has all of it found from then on."""
        found = self.pool.find("", tokens, len(tokens))
        assert all(tokens[: 4 * (i + 1)] in self.beginnings() for i in range(len(found.block_ids)))
        self.pool.share(found.block_ids)
        missing = self.pool.blocks_for(len(tokens)) - len(found.block_ids)
        if missing > self.pool.num_available:
            self.pool.release(found.block_ids)
            return
        block_ids = [*found.block_ids, *self.pool.allocate(missing)]
        self.pool.keep("", tokens, block_ids, 4 * len(found.block_ids), len(tokens))
        self.kept.add(tuple(tokens))
        again = self.pool.find("", tokens, len(tokens))
        assert again.block_ids == block_ids[: len(tokens) // 4]
        assert again.num_copyable == len(tokens) % 4
        self.holders.append(block_ids)

    def beginnings(self) -> list[list[int]]:
        return [list(tokens[:end]) for tokens in self.kept for end in range(len(tokens) + 1)]

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.holders:
            shared = list(data.draw(st.sampled_from(self.holders)))
            self.pool.share(shared)
            self.holders.append(shared)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.holders:
            index = data.draw(st.integers(0, len(self.holders) - 1))
            self.pool.release(self.holders.pop(index))

    @rule(data=st.data())
    def release_or_share_what_nobody_holds(self, data: st.DataObject) -> None:
        unheld = set(range(-1, 8)) - {block_id for holder in self.holders for block_id in holder}
        block_id = data.draw(st.sampled_from(sorted(unheld - self.pool._cached.keys())))
        with pytest.raises(ValueError, match=f"nobody holds block {block_id}"):
            self.pool.release([block_id])
        with pytest.raises(ValueError, match=f"nobody holds block {block_id}"):
            self.pool.share([block_id])

    @invariant()
    def accounts_agree(self) -> None:
        self.pool.check_integrity(self.holders)
        held = Counter(block_id for holder in self.holders for block_id in holder)
        assert self.pool.num_active == len(held)
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_active == self.pool.num_blocks


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_block_is_free_only_after_its_last_reference_is_released() -> None:
    pool = BlockPool(num_blocks=2, block_size=16)
    block_ids = pool.allocate(2)
    pool.share(block_ids[:1])
    pool.release(block_ids)
    assert pool.num_free == 1
    pool.release(block_ids[:1])
    assert pool.num_free == 2
    with pytest.raises(ValueError, match="nobody holds"):
        pool.release(block_ids[:1])


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for(num_tokens: int, expected: int) -> None:
    assert BlockPool(num_blocks=1, block_size=16).blocks_for(num_tokens) == expected


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (16, 0), (-1, 16)])
def test_a_pool_that_holds_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        BlockPool(num_blocks, block_size)


def test_integrity_check_finds_leaked_doubly_owned_and_lost_blocks() -> None:
    pool = BlockPool(num_blocks=4, block_size=16)
    block_ids = pool.allocate(2)
    with pytest.raises(RuntimeError, match="counts 1 references, its owners hold 0"):
        pool.check_integrity([block_ids[:1]])
    with pytest.raises(RuntimeError, match="counts 1 references, its owners hold 2"):
        pool.check_integrity([block_ids, block_ids[:1]])
    pool._free.append(pool._free[0])
    with pytest.raises(RuntimeError, match="3 blocks are listed as free, 2 are nobody's"):
        pool.check_integrity([block_ids])
