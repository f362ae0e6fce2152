"""Any schedule gives each request the tokens it gets alone, and the law of the scheduler holds at every step.

The fake runner keeps what a real one keeps, pages, and answers from what it finds there, not from what it is told.
"""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

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


@settings(max_examples=400, deadline=None)
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
    """The k-th oldest of requests with at most L tokens each ends within k * L steps, while newcomers keep coming; and
    a request is preempted at most as often as its room to grow can be too small.
    """
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
    for request in first:
        assert request.num_preemptions == 0 or simulation.block_size * 4 ** (request.num_preemptions - 1) < 20


def test_accounts_hold_through_ten_thousand_random_events() -> None:
    """Finish, cancel, deadline and preempt at random on a pool of 96 tokens, until 10,000 of them have happened."""
    chance = random.Random(20)
    simulation = Simulation(num_blocks=24, block_size=4, token_budget=16, max_running=8)
    number = 0
    while simulation.events.total() < 10_000:
        while simulation.scheduler.num_waiting < 4:
            number += 1
            prompt = chance.choices(range(VOCABULARY), k=chance.randint(1, 24))
            simulation.admit(make_request(number, prompt, chance.randint(1, 40), ends=chance.random() < 0.3))
        live = [*simulation.scheduler.running, *simulation.scheduler.waiting]
        victims = [(chance.choice(live), chance.choice(INTERRUPTIONS)) for _ in range(2) if chance.random() < 0.2]
        for request, reason in victims[:1]:
            simulation.interrupt(request, reason)
        for request in (*simulation.scheduler.running, *simulation.scheduler.paused):
            if chance.random() < (0.3 if request.state is RequestState.PAUSED else 0.005):
                simulation.turn(request)
        simulation.step(victims[1:])
    for request in (*simulation.scheduler.running, *simulation.scheduler.waiting, *simulation.scheduler.paused):
        simulation.interrupt(request, FinishReason.SHUTDOWN)
    simulation.check_answers()
    for event in ("preempted", "resumed", "cancelled", "deadline", "end_of_sequence", "stop_token", "max_tokens"):
        assert simulation.events[event] >= 200, simulation.events


def test_preemption_under_a_full_pool_wastes_little() -> None:
    """100 requests whose answers outgrow the pool: at most 3 preemptions each, under 20 % of the work is done twice."""
    chance = random.Random(4)
    simulation = Simulation(num_blocks=128, block_size=16, token_budget=64, max_running=32)
    for number in range(100):
        prompt = chance.choices(range(VOCABULARY), k=chance.randint(4, 40))
        simulation.admit(make_request(number, prompt, chance.randint(20, 250), ends=False))
    while simulation.scheduler.has_work:
        simulation.step()
    simulation.check_answers()
    assert simulation.scheduler.num_preemptions_total == simulation.events["preempted"] >= 20
    assert max(request.num_preemptions for request in simulation.requests) <= 3
    assert simulation.scheduler.recomputed_tokens_total < 0.2 * simulation.computed_tokens


def test_a_long_prompt_beside_growing_answers_is_not_preempted_again_and_again() -> None:
    """31 answers of staggered lengths; the pool is full when a prompt of most of its size joins them, and each answer
    that ends makes just enough room for it to try again.
    """
    simulation = Simulation(num_blocks=128, block_size=16, token_budget=64, max_running=32)
    for number in range(31):
        simulation.admit(make_request(number, [2] * 4, 20 * (number + 1), ends=False))
    simulation.admit(make_request(31, [3] * 1520, 50, ends=False))
    while simulation.scheduler.has_work:
        simulation.step()
    simulation.check_answers()
    assert simulation.scheduler.num_preemptions_total > 0
    assert max(request.num_preemptions for request in simulation.requests) <= 3
