"""What the prefix cache finds, shares, copies and evicts, on the smallest case that shows it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagestream.model.step import SamplingParams
from pagestream.server.prefix_tree import PrefixTree
from pagestream.server.request import FinishReason, Request
from tests.support.stepping import WORD, answer, make_scheduler, step

PAGE = 4


def make_request(name: str, prompt: list[int], max_new_tokens: int = 2, tenant: str = "") -> Request:
    return Request(name, prompt, SamplingParams(), max_new_tokens, tenant=tenant)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=11), max_size=12), st.lists(st.integers(0, 2)))
def test_what_is_found_is_the_longest_beginning_that_is_kept(kept: list[list[int]], wanted: list[int]) -> None:
    """Against a search through all that was kept, by brute force."""
    tree = PrefixTree(PAGE)
    contents: dict[int, list[int]] = {}
    for number, tokens in enumerate(kept):
        before: int | None = None
        for index, start in enumerate(range(0, len(tokens), PAGE)):
            block_id = 100 * number + index
            holder = tree.insert("", before, tuple(tokens[start : start + PAGE]), block_id)
            if holder == block_id:
                contents[block_id] = tokens[: start + PAGE]
            before = holder

    def common(tokens: list[int]) -> int:
        return next(
            (i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b), min(len(tokens), len(wanted))
        )

    found = tree.find("", wanted, len(wanted))
    assert len(found.block_ids) * PAGE + found.num_copyable == max(map(common, kept), default=0)
    for index, block_id in enumerate(found.block_ids):
        assert contents[block_id] == wanted[: (index + 1) * PAGE]
    if found.num_copyable:
        end = len(found.block_ids) * PAGE + found.num_copyable
        assert contents[found.copy_from][:end] == wanted[:end]
    assert tree.find("other", wanted, len(wanted)).block_ids == []


def test_a_prompt_that_begins_alike_shares_full_pages_and_copies_the_last() -> None:
    pool, scheduler = make_scheduler()
    first = make_request("first", [*range(10)], max_new_tokens=8)
    scheduler.admit(first)
    step(scheduler)
    scheduler.admit(second := make_request("second", [*range(10), 77, 78]))
    plan = scheduler.plan()
    chunk = plan.chunks[1]
    assert (chunk.start, chunk.length, chunk.copy_from) == (10, 2, first.block_ids[2])
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] not in first.block_ids
    scheduler.commit(plan, answer(plan))
    scheduler.check_integrity()
    assert (second.num_cached, scheduler.queried_tokens_total, scheduler.hit_tokens_total) == (10, 22, 10)
    assert pool.num_active == 4


def test_the_same_prompt_again_computes_one_token() -> None:
    _, scheduler = make_scheduler()
    for name in "ab":
        scheduler.admit(make_request(name, [*range(12)], max_new_tokens=1))
        assert step(scheduler) == [(name, 0, 12) if name == "a" else (name, 11, 1)]


def test_tenants_do_not_see_what_others_have_asked() -> None:
    _, scheduler = make_scheduler()
    for name in "ab":
        scheduler.admit(make_request(name, [*range(12)], max_new_tokens=1, tenant=name))
        assert step(scheduler) == [(name, 0, 12)]


def test_a_cancelled_prompt_keeps_what_it_computed() -> None:
    _, scheduler = make_scheduler(token_budget=8)
    scheduler.admit(cancelled := make_request("cancelled", [*range(20)]))
    step(scheduler)
    plan = scheduler.plan()
    scheduler.finish(cancelled, FinishReason.CANCELLED)  # the second chunk is in flight and does not count
    scheduler.commit(plan, answer(plan))
    scheduler.admit(make_request("again", [*range(20)]))
    assert step(scheduler) == [("again", 8, 8)]


def test_prompts_read_side_by_side_end_up_on_the_same_pages() -> None:
    pool, scheduler = make_scheduler(token_budget=64)
    a, b = (make_request(name, [*range(12)], max_new_tokens=4) for name in "ab")
    scheduler.admit(a)
    scheduler.admit(b)
    assert step(scheduler) == [("a", 0, 12), ("b", 0, 12)]
    assert a.block_ids == b.block_ids
    assert pool.num_active == 3


def test_the_longest_unused_is_evicted_first() -> None:
    pool, scheduler = make_scheduler(num_blocks=8, block_size=PAGE)
    prompts = {"a": [*range(12)], "b": [*range(50, 62)]}
    for name in "aba":
        scheduler.admit(make_request(name, prompts[name], max_new_tokens=1))
        step(scheduler)
    assert pool.num_cached == 6  # the copy of the last page is none more
    scheduler.admit(make_request("c", [*range(80, 92)], max_new_tokens=1))
    step(scheduler)
    assert pool.num_evictions_total == 1
    scheduler.admit(make_request("a", prompts["a"], max_new_tokens=1))
    assert step(scheduler) == [("a", 11, 1)]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_each_turn_of_a_chat_reads_only_what_is_new(prefix_cache: bool) -> None:
    """Ten turns of 21 tokens from the user and 9 from the model, which its end token closes."""
    pool, scheduler = make_scheduler(num_blocks=200, block_size=PAGE, prefix_cache=prefix_cache)
    history: list[int] = []
    for turn in range(10):
        new = [1000 * turn + number for number in range(21)]
        scheduler.admit(request := make_request(f"turn {turn}", history + new, max_new_tokens=9))
        read = 0
        while scheduler.has_work:
            read += sum(length for _, start, length in step(scheduler) if start < request.num_prompt_tokens)
        unread = len(new) + (1 if history else 0)  # an answer's last token is never computed
        assert read == (unread if prefix_cache else request.num_prompt_tokens)
        history = list(request.tokens)
        assert history[-1] == WORD
    assert (pool.num_active, pool.num_cached > 0) == (0, prefix_cache)
