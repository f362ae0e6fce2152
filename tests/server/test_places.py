"""Whose turn it is to start: between tenants by the places they hold, within one by priority, and nobody never."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.step import SampledToken, SamplingParams, StepResult
from pagestream.server.block_pool import BlockPool
from pagestream.server.request import Priority, Request, RequestState
from pagestream.server.scheduler import Scheduler

LOW, NORMAL, HIGH = Priority.LOW, Priority.NORMAL, Priority.HIGH


class Place:
    """A scheduler with room for everybody's blocks, so that places alone decide; every answer has its own length."""

    def __init__(self, max_running: int) -> None:
        self.scheduler = Scheduler(BlockPool(10_000, 4), token_budget=16 * max_running, max_running=max_running)
        self.order: list[str] = []  # of first starts

    def admit(self, name: str, steps: int = 1, tenant: str = "", priority: Priority = NORMAL) -> Request:
        """It runs for so many steps."""
        request = Request(name, [7], SamplingParams(), steps, tenant=tenant, priority=priority)
        self.scheduler.admit(request)
        return request

    def step(self) -> Counter[str]:
        """How many places each tenant had in it."""
        plan = self.scheduler.plan()
        places = Counter(request.tenant for request in self.scheduler.running)
        for request in self.scheduler.running:
            if request.request_id not in self.order:
                self.order.append(request.request_id)
        self.scheduler.commit(plan, StepResult(tuple((SampledToken(1),) for _ in plan.chunks)))
        return places

    def run(self) -> list[str]:
        while self.scheduler.has_work:
            self.step()
        return self.order


def test_a_tenant_that_holds_every_place_gives_the_first_one_back_to_one_that_has_none() -> None:
    place = Place(max_running=4)
    for number in range(12):
        place.admit(f"a{number}", steps=2 + number % 4, tenant="a")
    place.step()
    place.admit("b", tenant="b")
    place.run()
    assert place.order[:5] == ["a0", "a1", "a2", "a3", "b"]


def test_tenants_with_work_enough_come_to_hold_the_same_places() -> None:
    """`a` holds all eight when `b` and `c` come; once its first answers have ended, none ever has two more than
    another.
    """
    place, number = Place(max_running=8), count()
    for steps in range(300):
        for tenant in "abc" if steps else "a":
            while sum(request.tenant == tenant for request in place.scheduler.waiting) < 10:
                place.admit(f"{tenant}{next(number)}", steps=3 + next(number) % 7, tenant=tenant)
        places = place.step()
        assert sum(places.values()) == 8
        if steps > 10:
            assert sorted(places.values()) == [2, 3, 3]


def test_within_a_tenant_the_highest_priority_starts_first() -> None:
    place = Place(max_running=1)
    place.admit("runs", steps=2)
    place.step()
    for name, priority in (("low", LOW), ("normal", NORMAL), ("high", HIGH), ("high too", HIGH)):
        place.admit(name, priority=priority)
    assert place.run() == ["runs", "high", "high too", "normal", "low"]


def test_a_priority_moves_nothing_between_tenants() -> None:
    place = Place(max_running=2)
    place.admit("a runs", steps=9, tenant="a")
    place.admit("b runs", steps=1, tenant="b")
    place.step()
    place.admit("a high", tenant="a", priority=HIGH)
    place.admit("b low", tenant="b", priority=LOW)
    assert place.run() == ["a runs", "b runs", "b low", "a high"]


def test_of_four_starts_of_a_tenant_one_is_its_oldests() -> None:
    place, number = Place(max_running=1), count()
    low = [place.admit(f"low{k}", priority=LOW) for k in range(3)]
    for _ in range(12):
        place.admit(f"high{next(number)}", priority=HIGH)
        place.admit(f"high{next(number)}", priority=HIGH)
        place.step()
    assert [place.order.index(request.request_id) for request in low] == [3, 7, 11]


def test_who_has_started_before_comes_first() -> None:
    """One back from a pause, and it is not of the tenant that holds the fewest places."""
    place = Place(max_running=2)
    back = place.admit("back", steps=9, tenant="a")
    place.admit("other", steps=9, tenant="a")
    place.step()
    place.scheduler.pause(back)
    place.admit("b", steps=2, tenant="b")
    place.step()
    place.admit("c", tenant="c", priority=HIGH)
    place.scheduler.resume(back)
    place.step()
    place.step()
    assert back.state is RequestState.RUNNING
    assert place.order == ["back", "other", "b"]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(Priority), st.integers(1, 6)), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_the_kth_oldest_ends_within_a_bound_that_later_ones_cannot_move(
    max_running: int, first: list[tuple[str, Priority, int]], chance: object
) -> None:
    """While a flood of the highest priority, of its own and of ever new tenants, keeps coming. Answers have at most L
    tokens. A tenant's running requests end within L steps of whatever moment; then it holds the fewest places, and
    only tenants with older requests start before it, of which there are fewer than k; so it starts one within (L + 1)
    k steps. One of four is its oldest.
    """
    place, longest = Place(max_running), 6
    requests = [
        place.admit(f"r{k}", steps, tenant, priority) for k, (tenant, priority, steps) in enumerate(first, start=1)
    ]
    for steps in range(100_000):
        if all(request.is_finished for request in requests):
            return
        for k, request in enumerate(requests, start=1):
            assert request.is_finished or steps < 4 * k * k * (longest + 1) + longest
        for tenant in ("a", "b", f"new {steps}") if place.scheduler.num_waiting < 15 else ():
            place.admit(f"{tenant} {steps}", longest, tenant, HIGH)
        place.step()
    pytest.fail("it did not end")
