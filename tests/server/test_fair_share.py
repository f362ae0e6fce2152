"""Prompt tokens shared between tenants and, within a tenant, between long and short prompts."""

from __future__ import annotations

import random
from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.step import SampledToken, SamplingParams, StepResult
from pagestream.server.block_pool import BlockPool
from pagestream.server.fair_share import FairShare
from pagestream.server.request import Priority, Request
from pagestream.server.scheduler import Scheduler


def make_request(
    name: str,
    num_prompt_tokens: int,
    tenant: str = "",
    max_new_tokens: int = 1,
    priority: Priority = Priority.NORMAL,
) -> Request:
    return Request(name, [7] * num_prompt_tokens, SamplingParams(), max_new_tokens, tenant=tenant, priority=priority)


def divide(fair_share: FairShare, prompts: list[Request], budget: int) -> dict[str, int]:
    return {request.request_id: share for request, share in fair_share.divide(prompts, budget)}


@pytest.mark.parametrize(
    ("lengths", "shares"),
    [
        ([100], [40]),
        ([30], [30]),
        ([100, 32], [10, 30]),  # a quarter for the oldest, the rest for the shortest
        ([100, 20], [20, 20]),
        ([100, 100], [40, 0]),  # one after the other ends more of them early than both at once
        ([100, 90, 50], [10, 0, 30]),
        ([100, 8, 8, 8, 8, 8], [10, 8, 8, 8, 6, 0]),
        ([3, 100], [3, 37]),
        ([1, 1, 1], [1, 1, 1]),
    ],
)
def test_within_a_tenant_short_prompts_are_soon_and_the_oldest_is_always(lengths: list[int], shares: list[int]) -> None:
    prompts = [make_request(str(number), length) for number, length in enumerate(lengths)]
    expected = {str(number): share for number, share in enumerate(shares) if share}
    assert divide(FairShare(), prompts, 40) == expected


def test_within_a_tenant_priority_goes_before_length() -> None:
    old, short = make_request("old", 100), make_request("short", 20)
    high, low = make_request("high", 60, priority=Priority.HIGH), make_request("low", 5, priority=Priority.LOW)
    assert divide(FairShare(), [old, short, low, high], 40) == {"old": 10, "high": 30}
    assert divide(FairShare(), [old, short, low, high], 100) == {"old": 25, "short": 15, "high": 60}


def test_a_tenant_with_many_prompts_gets_no_more_than_one_with_one() -> None:
    flood = [make_request(f"flood {number}", 500, tenant="flood") for number in range(20)]
    shares = divide(FairShare(), [*flood, make_request("alone", 500, tenant="alone")], 100)
    assert shares == {"flood 0": 50, "alone": 50}


def test_one_that_was_away_comes_back_without_credit() -> None:
    fair_share = FairShare()
    busy, back = make_request("busy", 10_000, tenant="a"), make_request("back", 10_000, tenant="b")
    divide(fair_share, [busy, back], 100)
    for _ in range(10):
        assert divide(fair_share, [busy], 100) == {"busy": 100}
    assert divide(fair_share, [busy, back], 100) == {"busy": 50, "back": 50}


def test_going_away_for_a_step_washes_nothing_off() -> None:
    """`a` took a whole step while `b` had nothing to read but `c` had: it must not start level with `c` again."""
    fair_share = FairShare()
    a, c = make_request("a", 1000, tenant="a"), make_request("c", 10, tenant="c")
    assert divide(fair_share, [a, c], 100) == {"a": 90, "c": 10}
    c = make_request("c", 1000, tenant="c")
    divide(fair_share, [c], 10)
    assert divide(fair_share, [c, a], 50) == {"c": 50}


def test_little_is_remembered_of_tenants_that_have_gone() -> None:
    fair_share, staying = FairShare(), make_request("staying", 20, tenant="staying")  # it stays at its beginning
    for number in range(1000):
        divide(fair_share, [staying, make_request("r", 5, tenant=str(number))], 20)
    assert len(fair_share._had) <= 2


prompts = st.lists(st.tuples(st.integers(1, 60), st.sampled_from("abc")), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(prompts, st.integers(1, 50)), min_size=1, max_size=6))
def test_no_token_is_lost_none_is_invented_and_the_oldest_gets_one(rounds: list) -> None:
    fair_share = FairShare()
    for lengths, budget in rounds:
        requests = [make_request(str(n), length, tenant=tenant) for n, (length, tenant) in enumerate(lengths)]
        shares = divide(fair_share, requests, budget)
        assert sum(shares.values()) == min(budget, sum(length for length, _ in lengths))
        assert shares["0"] >= 1
        assert all(1 <= share <= lengths[int(name)][0] for name, share in shares.items())


@pytest.mark.parametrize("num_tenants", [2, 3, 5])
@pytest.mark.parametrize("budget", [200, 333])
def test_tenants_that_always_have_prompts_differ_by_at_most_one_steps_tokens(num_tenants: int, budget: int) -> None:
    """After any interval, whatever lengths they send; counted from the plans of a scheduler."""
    chance, number = random.Random(num_tenants), count()
    scheduler = Scheduler(BlockPool(10_000, 16, prefix_cache=False), token_budget=budget, max_running=budget)
    names = [str(tenant) for tenant in range(num_tenants)]
    history = [Counter[str]()]
    for _ in range(200):
        backlog = Counter[str]()
        for request in (*scheduler.running, *scheduler.waiting):
            backlog[request.tenant] += request.num_uncomputed
        for tenant in names:
            while backlog[tenant] < budget:
                length = chance.choice((5, 40, 300) if tenant == "0" else (30, 1000))
                scheduler.admit(make_request(str(next(number)), length, tenant=tenant))
                backlog[tenant] += length
        plan = scheduler.plan()
        owners = {request.request_id: request.tenant for request in scheduler.running}
        history.append(history[-1].copy())
        for chunk in plan.chunks:
            history[-1][owners[chunk.request_id]] += chunk.length
        scheduler.commit(plan, StepResult(tuple((SampledToken(1),) if chunk.samples else () for chunk in plan.chunks)))
    assert history[-1].total() == 200 * budget
    for begin in range(0, 200, 3):
        for end in range(begin + 1, 201):
            had = [history[end][tenant] - history[begin][tenant] for tenant in names]
            assert max(had) - min(had) <= budget
