"""Any schedule gives each request the tokens it gets alone, and the law of the scheduler holds at every step.

The fake runner keeps what a real one keeps, pages, and answers from what it finds there, not from what it is told.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagestream.server.admission import MAX_PREEMPTIONS
from pagestream.server.request import FinishReason, Request, RequestState
from tests.support.scheduling import INTERRUPTIONS, VOCABULARY, Simulation, make_request


@st.composite
def simulations(draw: st.DrawFn) -> Simulation:
    max_running = draw(st.integers(1, 5))
    return Simulation(
        num_blocks=draw(st.integers(1, 10)),
        block_size=draw(st.sampled_from((1, 2, 4))),
        token_budget=draw(st.integers(max_running, max_running + 8)),
        max_running=max_running,
        prefix_cache=draw(st.sampled_from((True, True, False))),
        speculation=draw(st.booleans()),
    )


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Many begin alike: with some of the tokens that a counter gives, and then on their own."""
    common = draw(st.integers(0, 16))
    rest = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=not common, max_size=20 - common))
    return [*range(2, 2 + VOCABULARY - 2), *range(2, 2 + VOCABULARY - 2)][:common] + rest


arrivals = st.tuples(prompts(), st.integers(1, 20), st.booleans(), st.sampled_from(("", "", "other")))
interruptions = st.tuples(st.integers(0, 7), st.sampled_from(INTERRUPTIONS))
commands = st.one_of(
    st.tuples(st.just("admit"), arrivals),
    st.tuples(st.just("interrupt"), interruptions),
    st.tuples(st.just("turn"), st.integers(0, 7)),
    st.tuples(st.just("step"), st.none() | interruptions),
)


# The one of the other tenant starts in its turn; the second, older, does not fit beside it and waits for it to end.
OUT_OF_ORDER = [
    ("admit", ([2], 1, False, "")),
    ("admit", ([3] * 4, 4, False, "")),
    ("admit", ([4] * 4, 4, False, "other")),
    *[("step", None)] * 2,
]


@settings(max_examples=400, deadline=None)
@example(Simulation(num_blocks=10, block_size=1, token_budget=8, max_running=2), OUT_OF_ORDER)
@given(simulations(), st.lists(commands, max_size=60))
def test_any_schedule_answers_as_if_each_request_ran_alone(simulation: Simulation, script: list) -> None:
    def pick(interruption: tuple[int, FinishReason]) -> list[tuple[Request, FinishReason]]:
        """Counts from the newest; a request that has finished may be meant as well."""
        index, reason = interruption
        return [(simulation.requests[-1 - index], reason)] if index < len(simulation.requests) else []

    for number, (command, argument) in enumerate(script):
        if command == "admit":
            prompt, max_new_tokens, ends, tenant = argument
            simulation.admit(make_request(number, prompt, max_new_tokens, ends=ends, tenant=tenant))
        elif command == "interrupt":
            for request, reason in pick(argument):
                simulation.interrupt(request, reason)
        elif command == "turn":
            for request in simulation.requests[::-1][argument : argument + 1]:
                simulation.turn(request)
        else:
            simulation.step(pick(argument) if argument else ())
    simulation.run_to_the_end()
    simulation.check_answers()


@settings(max_examples=200, deadline=None)
@given(simulations(), st.lists(st.tuples(prompts(), st.integers(1, 20)), min_size=1, max_size=8), st.randoms())
def test_every_request_finishes_within_a_bound_that_later_ones_cannot_move(
    simulation: Simulation, wanted: list[tuple[list[int], int]], chance: random.Random
) -> None:
    """The k-th oldest of requests with at most L tokens each ends within k * L steps, while newcomers keep coming."""
    for number, (prompt, max_new_tokens) in enumerate(wanted):
        simulation.admit(make_request(number, prompt, max_new_tokens))
    first = list(simulation.requests)
    longest = max((request.num_prompt_tokens + request.max_new_tokens for request in first), default=0)
    number = len(wanted)
    while not all(request.is_finished for request in first):
        for k, request in enumerate(first, start=1):
            assert request.is_finished or simulation.steps < k * longest
        if chance.random() < 0.5:
            number += 1
            simulation.admit(make_request(number, [chance.randrange(VOCABULARY)] * chance.randint(1, 20), 20))
        simulation.step()
    assert max((request.num_preemptions for request in first), default=0) <= MAX_PREEMPTIONS


def test_accounts_hold_through_thousands_of_random_events() -> None:
    """Finish, cancel, deadline and preempt at random on a pool of 96 tokens, until 5,000 of them have happened."""
    chance = random.Random(20)
    simulation = Simulation(num_blocks=24, block_size=4, token_budget=16, max_running=8)
    number = 0
    while simulation.events.total() < 5_000:
        while simulation.scheduler.num_waiting < 4:
            number += 1
            prompt = chance.choices(range(VOCABULARY), k=chance.randint(1, 24))
            simulation.admit(make_request(number, prompt, chance.randint(1, 70), ends=chance.random() < 0.3))
        live = [*simulation.scheduler.running, *simulation.scheduler.waiting]
        victims = [(chance.choice(live), chance.choice(INTERRUPTIONS)) for _ in range(2) if chance.random() < 0.03]
        for request, reason in victims[:1]:
            simulation.interrupt(request, reason)
        for request in (*simulation.scheduler.running, *simulation.scheduler.paused):
            if chance.random() < (0.3 if request.state is RequestState.PAUSED else 0.005):
                simulation.turn(request)
        simulation.step(victims[1:])
    for request in (*simulation.scheduler.running, *simulation.scheduler.waiting, *simulation.scheduler.paused):
        simulation.interrupt(request, FinishReason.SHUTDOWN)
    simulation.check_answers()
    for event in ("preempted", "resumed", "cancelled", "deadline", "end_of_sequence", "stop_token", "copied"):
        assert simulation.events[event] >= 100, simulation.events


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_under_a_full_pool_wastes_little(prefix_cache: bool) -> None:
    """120 requests whose answers are larger than their share of the pool, which is full all the time."""
    chance = random.Random(4)
    simulation = Simulation(num_blocks=128, block_size=4, token_budget=64, max_running=32, prefix_cache=prefix_cache)
    for number in range(120):
        prompt = chance.choices(range(VOCABULARY), k=chance.randint(1, 40))
        simulation.admit(make_request(number, prompt, chance.randint(5, 200), ends=False))
    while simulation.scheduler.has_work:
        simulation.step()
    simulation.check_answers()
    scheduler = simulation.scheduler
    assert scheduler.num_preemptions_total == simulation.events["preempted"] >= 20
    assert max(request.num_preemptions for request in simulation.requests) <= MAX_PREEMPTIONS
    assert scheduler.recomputed_tokens_total < 0.2 * simulation.computed_tokens


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(prompts(), st.integers(20, 60)), min_size=4, max_size=12),
    st.lists(st.booleans(), max_size=150),
    st.booleans(),
)
def test_no_request_is_preempted_more_often_than_it_may(
    wanted: list[tuple[list[int], int]], pauses: list[bool], prefix_cache: bool
) -> None:
    """Also when readers fall behind at random, so that older requests come back beside younger ones."""
    simulation = Simulation(num_blocks=40, block_size=2, token_budget=16, max_running=8, prefix_cache=prefix_cache)
    for number, (prompt, max_new_tokens) in enumerate(wanted):
        simulation.admit(make_request(number, prompt, max_new_tokens, ends=False))
    for number, pause in enumerate(pauses):
        queue = simulation.scheduler.running if pause else simulation.scheduler.paused
        if queue:
            simulation.turn(queue[number % len(queue)])
        simulation.step()
    simulation.run_to_the_end()
    simulation.check_answers()
    assert max(request.num_preemptions for request in simulation.requests) <= MAX_PREEMPTIONS
