"""Who gives up the blocks that others need, and what that costs."""

from __future__ import annotations

import random

import pytest

from pagestream.model.step import SampledToken, StepResult
from pagestream.server.block_pool import BlockPool
from pagestream.server.request import FinishReason, Request, RequestState
from pagestream.server.scheduler import Scheduler
from tests.support.stepping import EOS, WORD, make_request, make_scheduler, step


def preempted_pair() -> tuple[BlockPool, Scheduler, Request, Request, list[tuple[str, int, int]]]:
    """Two answers grow until the pool of 12 blocks is full; the last element is the step that preempts."""
    pool, scheduler = make_scheduler(num_blocks=12, block_size=4)
    old, young = make_request("old", 8, 40), make_request("young", 8, 40)
    scheduler.admit(old)
    scheduler.admit(young)
    while scheduler.num_preemptions_total == 0 and scheduler.has_work:
        chunks = step(scheduler)
    return pool, scheduler, old, young, chunks


def test_the_youngest_is_preempted_and_is_not_in_that_plan() -> None:
    pool, _, old, young, chunks = preempted_pair()
    assert chunks == [("old", 24, 1)]
    assert (young.state, young.num_computed, young.block_ids) == (RequestState.WAITING, 0, [])
    assert (young.num_output_tokens, young.num_preemptions, old.num_preemptions) == (17, 1, 0)
    assert (pool.num_active, pool.num_cached) == (len(old.block_ids), 5) == (7, 5)


def test_a_preempted_request_waits_in_front_and_computes_again_only_what_was_evicted() -> None:
    """Its last page, tokens 20 to 23, went to the other; token 24 it had not computed."""
    _, scheduler, old, _, _ = preempted_pair()
    scheduler.admit(make_request("newcomer", 2))
    assert [r.request_id for r in scheduler.waiting] == ["young", "newcomer"]
    scheduler.finish(old, FinishReason.CANCELLED)
    assert step(scheduler)[0] == ("young", 20, 5)
    assert scheduler.recomputed_tokens_total == 4


def test_only_what_was_computed_before_counts_as_recomputed() -> None:
    """20 tokens, 8 a step, preempted after 16 and again after 8 of them: 8 + 16 were computed twice."""
    _, scheduler = make_scheduler(token_budget=8, prefix_cache=False)
    scheduler.admit(make_request("a", 20))
    for steps in (2, 1):
        for _ in range(steps):
            step(scheduler)
        scheduler._preempt_youngest()
    for _ in range(5):
        step(scheduler)
    assert scheduler.recomputed_tokens_total == 8 + 16


def test_a_pause_keeps_its_place_and_costs_only_what_others_needed() -> None:
    pool, scheduler = make_scheduler(num_blocks=10, block_size=4, max_running=2)
    a, b = make_request("a", 8, 12), make_request("b", 4, 4)
    for request in (a, b):
        scheduler.admit(request)
    step(scheduler)
    scheduler.pause(a)
    assert [step(scheduler) for _ in range(2)] == [[("b", 4, 1)], [("b", 5, 1)]]
    assert (a.state, a.block_ids, pool.num_cached) == (RequestState.PAUSED, [], 2)
    scheduler.admit(make_request("c", 16, 2))
    scheduler.resume(a)
    assert [request.request_id for request in scheduler.waiting] == ["a", "c"]
    assert step(scheduler) == [("b", 6, 1), ("a", 8, 1)]
    assert (a.num_preemptions, scheduler.recomputed_tokens_total) == (0, 0)
    scheduler.pause(a)
    assert step(scheduler) == [("c", 0, 16)]
    scheduler.resume(a)
    while scheduler.has_work:
        step(scheduler)
    assert (a.num_output_tokens, a.num_preemptions) == (12, 0)
    assert pool.num_active == 0


@pytest.mark.parametrize("workload", ["chats", "long", "whole pool", "half whole pool"])
def test_under_a_pool_that_is_always_full_less_than_a_fifth_is_recomputed(workload: str) -> None:
    """Five times 60 requests each, whose answers grow without end in sight."""
    shares, preempted = [], 0
    for seed in range(5):
        chance = random.Random(f"{workload} {seed}")
        pool, scheduler = make_scheduler(num_blocks=64, block_size=4, token_budget=64)
        lengths = {}
        for number in range(60):
            prompt, answer, most = _lengths(workload, chance)
            lengths[str(number)] = answer
            scheduler.admit(make_request(str(number), prompt, min(most, pool.capacity - prompt)))
        computed = 0
        while scheduler.has_work:
            plan = scheduler.plan()
            computed += plan.num_tokens
            ends = [chunk.end - chunk.num_prompt_tokens + 1 >= lengths[chunk.request_id] for chunk in plan.chunks]
            tokens = [SampledToken(EOS if end else WORD) for end in ends]
            result = StepResult(tuple((t,) if c.samples else () for c, t in zip(plan.chunks, tokens, strict=True)))
            scheduler.commit(plan, result)
        preempted += scheduler.num_preemptions_total
        shares.append(scheduler.recomputed_tokens_total / computed)
    assert preempted
    assert max(shares) < 0.2, shares


def _lengths(workload: str, chance: random.Random) -> tuple[int, int, int]:
    """Tokens of a prompt, of its answer, and those that its client allows, on a pool of 256."""
    if workload == "chats":
        answer = chance.randint(4, 40)
        return chance.randint(2, 40), answer, answer * chance.choice((1, 4))
    if workload == "long":
        return chance.randint(2, 30), chance.randint(10, 100), 100
    if workload == "whole pool" or chance.random() < 0.5:
        return chance.randint(2, 50), chance.randint(120, 250), 256
    return chance.randint(2, 25), chance.randint(2, 25), 25
