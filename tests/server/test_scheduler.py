"""Each rule of the scheduler on the smallest case that shows it."""

from __future__ import annotations

import pytest

from pagestream.model.step import SampledToken, SamplingParams, StepPlan, StepResult
from pagestream.server.errors import PromptExceedsKvCapacityError
from pagestream.server.request import FinishReason, Request, RequestState
from pagestream.server.scheduler import Advance
from tests.support.stepping import EOS, STOP, WORD, answer, make_request, make_scheduler, step


def test_a_step_runs_decodes_first_then_prompt_chunks_within_one_budget() -> None:
    _, scheduler = make_scheduler(token_budget=16)
    for name, length in (("a", 10), ("b", 30), ("c", 3), ("d", 3)):
        scheduler.admit(make_request(name, length))
    assert step(scheduler) == [("a", 0, 10), ("c", 0, 3), ("d", 0, 3)]
    assert step(scheduler) == [("a", 10, 1), ("c", 3, 1), ("d", 3, 1), ("b", 0, 13)]
    assert step(scheduler) == [("a", 11, 1), ("c", 4, 1), ("d", 4, 1), ("b", 13, 13)]
    assert step(scheduler) == [("a", 12, 1), ("c", 5, 1), ("d", 5, 1), ("b", 26, 4)]


def test_tokens_of_a_prompt_and_of_its_answer_are_never_in_one_chunk_and_the_prompts_come_last() -> None:
    """Also when an answer is computed again, given, or the prompt has one token left to read."""
    _, scheduler = make_scheduler(token_budget=64, prefix_cache=False)
    again, other = make_request("again", 10), make_request("other", 5)
    scheduler.admit(again)
    for _ in range(4):
        step(scheduler)
    scheduler.pause(again)
    scheduler.resume(again)
    scheduler.admit(other)
    scheduler.admit(Request("given", [1, 2, 3, 4, 5], SamplingParams(), 1, given=[4, 5, 6]))
    assert step(scheduler) == [("again", 0, 10), ("other", 0, 5), ("given", 0, 3)]
    scheduler.admit(make_request("one token", 1))
    assert step(scheduler) == [("other", 5, 1), ("again", 10, 4), ("given", 3, 2), ("one token", 0, 1)]


def test_prompts_beside_decodes_keep_to_the_callers_limit_but_always_get_on() -> None:
    _, scheduler = make_scheduler(token_budget=16)
    scheduler.admit(make_request("a", 3))
    assert scheduler.plan(max_prompt_tokens=1).num_tokens == 3  # nothing decodes, so nobody waits
    step(scheduler)
    scheduler.admit(make_request("b", 30))
    assert [scheduler.plan(limit).num_tokens for limit in (-7, 0, 5, 100)] == [1 + 1, 1 + 1, 1 + 5, 16]


def test_a_long_prompt_delays_no_running_answer_and_bounds_the_wait_of_a_short_one() -> None:
    """A 64-chunk prompt arrives beside a decoding stream; in its middle come 32-token prompts, one after the other."""
    _, scheduler = make_scheduler(num_blocks=2000, token_budget=64)
    stream, long = make_request("stream", 4, 200), make_request("long", 64 * 63)
    scheduler.admit(stream)
    step(scheduler)
    scheduler.admit(long)
    for steps in range(1, 100):
        before = long.num_computed
        if steps % 2:
            scheduler.admit(short := make_request(f"short {steps}", 32, max_new_tokens=2))
        step(scheduler)
        assert stream.num_output_tokens == 1 + steps
        assert short.num_output_tokens == (1 if steps % 2 else 2)
        assert long.num_computed >= 64 * 63 or long.num_computed - before >= 16  # a quarter of the budget
    assert long.num_output_tokens > 0


def test_blocks_are_taken_chunk_by_chunk() -> None:
    pool, scheduler = make_scheduler(token_budget=8, block_size=4)
    scheduler.admit(make_request("a", 20))
    assert [(step(scheduler), pool.num_active)[1] for _ in range(4)] == [2, 4, 5, 6]


def test_no_more_requests_run_than_may() -> None:
    _, scheduler = make_scheduler(max_running=2)
    for name in "abc":
        scheduler.admit(make_request(name, 2, max_new_tokens=2))
    step(scheduler)
    assert [r.request_id for r in scheduler.running] == ["a", "b"]
    assert (scheduler.num_waiting, scheduler.waiting_tokens) == (1, 2)
    step(scheduler)
    assert step(scheduler) == [("c", 0, 2)]


def test_nothing_overtakes_the_oldest_waiting_request() -> None:
    """`b` does not fit beside `a`; `c` would, but waits behind it, so `b` starts as soon as `a` is gone."""
    _, scheduler = make_scheduler(num_blocks=8, block_size=4)
    for name, length in (("a", 14), ("b", 24), ("c", 2)):
        scheduler.admit(make_request(name, length, max_new_tokens=2))
    assert [name for name, _, _ in step(scheduler)] == ["a"]
    assert [name for name, _, _ in step(scheduler)] == ["a"]
    assert step(scheduler) == [("b", 0, 14), ("c", 0, 2)]


def test_a_prompt_half_computed_keeps_the_room_for_its_other_half() -> None:
    """Chunk by chunk must not mean that two prompts start which only fit one after the other."""
    _, scheduler = make_scheduler(num_blocks=8, block_size=4, token_budget=8)
    scheduler.admit(make_request("a", 24))
    scheduler.admit(make_request("b", 8))
    for _ in range(3):
        assert [name for name, _, _ in step(scheduler)] == ["a"]
    assert scheduler.num_preemptions_total == 0


def test_nothing_works_while_all_are_paused() -> None:
    _, scheduler = make_scheduler()
    request = make_request("a", 5)
    scheduler.admit(request)
    plan = scheduler.plan()
    scheduler.pause(request)  # the step in flight counts for nothing
    assert scheduler.commit(plan, answer(plan)) == []
    assert not scheduler.has_work
    assert scheduler.plan() == StepPlan(())
    scheduler.resume(request)
    assert step(scheduler) == [("a", 0, 5)]


@pytest.mark.parametrize(
    ("token_id", "max_new_tokens", "capacity", "reason"),
    [
        (EOS, 8, False, FinishReason.END_OF_SEQUENCE),
        (EOS, 1, False, FinishReason.END_OF_SEQUENCE),
        (STOP, 8, False, FinishReason.STOP_TOKEN),
        (WORD, 1, False, FinishReason.MAX_TOKENS),
        (WORD, 1, True, FinishReason.MAX_CONTEXT),
        (WORD, 2, False, None),
    ],
)
def test_why_an_answer_ends(token_id: int, max_new_tokens: int, capacity: bool, reason: FinishReason | None) -> None:
    pool, scheduler = make_scheduler()
    request = make_request("a", 5, max_new_tokens, capacity=capacity)
    scheduler.admit(request)
    plan = scheduler.plan()
    assert scheduler.commit(plan, answer(plan, token_id)) == [Advance(request, (SampledToken(token_id),))]
    assert request.finish_reason is reason
    assert (pool.num_active == 0) == (reason is not None) == (not scheduler.has_work)


def test_an_answer_that_outgrows_the_pool_ends_instead_of_blocking_it() -> None:
    pool, scheduler = make_scheduler(num_blocks=2, block_size=4)
    request = make_request("a", 5, max_new_tokens=100)
    scheduler.admit(request)
    while scheduler.has_work:
        step(scheduler)
    assert request.finish_reason is FinishReason.MAX_CONTEXT
    assert request.num_tokens == 8 + 1  # the pool is full, and its last token's successor is known
    assert pool.num_active == 0


@pytest.mark.parametrize("num_prompt_tokens", [1024, 2048])
def test_a_prompt_larger_than_the_pool_is_refused_and_blocks_nobody(num_prompt_tokens: int) -> None:
    """Against a pool of 1,024 tokens, of which one is kept for the answer; those behind it complete."""
    pool, scheduler = make_scheduler(num_blocks=64, block_size=16, token_budget=256)
    too_long, short, longest = (
        make_request("too long", num_prompt_tokens),
        make_request("b", 16),
        make_request("c", 1023),
    )
    with pytest.raises(PromptExceedsKvCapacityError):
        scheduler.admit(too_long)
    scheduler.admit(short)
    scheduler.admit(longest)
    scheduler.finish(too_long, FinishReason.ERROR)
    while scheduler.has_work:
        step(scheduler)
    assert (short.finish_reason, longest.finish_reason) == (FinishReason.MAX_TOKENS, FinishReason.MAX_CONTEXT)
    assert pool.num_active == 0


def test_no_block_is_kept_for_an_answers_last_token_which_is_never_computed() -> None:
    _, scheduler = make_scheduler(num_blocks=2, block_size=4)
    for name in "ab":
        scheduler.admit(make_request(name, 3, max_new_tokens=2))
    assert step(scheduler) == [("a", 0, 3), ("b", 0, 3)]
    assert step(scheduler) == [("a", 3, 1), ("b", 3, 1)]
    assert not scheduler.has_work


def test_a_request_cancelled_while_its_step_runs_is_left_out_of_the_commit() -> None:
    pool, scheduler = make_scheduler()
    cancelled, other = make_request("cancelled", 5), make_request("other", 5)
    scheduler.admit(cancelled)
    scheduler.admit(other)
    plan = scheduler.plan()
    pages = tuple(plan.chunks[0].block_ids)
    scheduler.finish(cancelled, FinishReason.CANCELLED)
    assert tuple(plan.chunks[0].block_ids) == pages  # the step still runs on them
    assert pool.num_active == len(other.block_ids)
    assert [advance.request for advance in scheduler.commit(plan, answer(plan))] == [other]
    assert (cancelled.num_output_tokens, cancelled.num_computed) == (0, 0)
    scheduler.check_integrity()


@pytest.mark.parametrize("steps_before", [0, 1, 3], ids=["waiting", "in its prompt", "decoding"])
def test_the_first_of_several_endings_counts(steps_before: int) -> None:
    pool, scheduler = make_scheduler(token_budget=8)
    request = make_request("a", 10)
    scheduler.admit(request)
    for _ in range(steps_before):
        step(scheduler)
    scheduler.finish(request, FinishReason.DEADLINE)
    scheduler.finish(request, FinishReason.CANCELLED)
    assert request.finish_reason is FinishReason.DEADLINE
    assert pool.num_active == 0
    assert scheduler.plan() == StepPlan(())
    scheduler.check_integrity()


def test_only_the_latest_plan_is_committed_and_only_once() -> None:
    _, scheduler = make_scheduler()
    scheduler.admit(make_request("a", 5))
    stale, plan = scheduler.plan(), scheduler.plan()
    result = answer(plan)
    with pytest.raises(ValueError, match="latest plan"):
        scheduler.commit(stale, result)
    scheduler.commit(plan, result)
    with pytest.raises(ValueError, match="latest plan"):
        scheduler.commit(plan, result)


def test_a_result_that_does_not_answer_the_plan_is_refused() -> None:
    _, scheduler = make_scheduler(token_budget=8)
    scheduler.admit(make_request("a", 10))
    with pytest.raises(ValueError, match="does not answer"):
        scheduler.commit(scheduler.plan(), StepResult(((SampledToken(WORD),),)))
    with pytest.raises(ValueError, match="shorter"):
        scheduler.commit(scheduler.plan(), StepResult(()))


@pytest.mark.parametrize(("token_budget", "max_running"), [(7, 8), (8, 0)])
def test_limits_that_could_starve_a_request_are_refused(token_budget: int, max_running: int) -> None:
    with pytest.raises(ValueError, match=r"token budget|nothing could ever run"):
        make_scheduler(token_budget=token_budget, max_running=max_running)


def test_integrity_check_finds_what_disagrees() -> None:
    pool, scheduler = make_scheduler(max_running=2)
    a, b, c = (make_request(name, 5) for name in "abc")
    for request in (a, b, c):
        scheduler.admit(request)
    step(scheduler)

    leaked = pool.allocate(1)
    with pytest.raises(RuntimeError, match="owners hold 0"):
        scheduler.check_integrity()
    pool.release(leaked)
    a.num_computed += 1
    with pytest.raises(RuntimeError, match="num_computed < len"):
        scheduler.check_integrity()
    a.num_computed -= 1
    c.state = RequestState.RUNNING
    with pytest.raises(RuntimeError, match="among those"):
        scheduler.check_integrity()
    c.state = RequestState.WAITING
    a.arrival, b.arrival = b.arrival, a.arrival
    with pytest.raises(RuntimeError, match="arrival order"):
        scheduler.check_integrity()
