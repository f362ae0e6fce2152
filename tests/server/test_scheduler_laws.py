"""The laws of the scheduler over about a million steps: a state machine sends it all that can happen, in any order.

A step of the model costs tens of microseconds, so hypothesis draws whole storms of random events beside single ones.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from itertools import combinations
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pagestream.model.step import Chunk, SampledToken, SamplingParams, StepResult
from pagestream.server.block_pool import BlockPool
from pagestream.server.request import FinishReason, Priority, Request, RequestState
from pagestream.server.scheduler import Scheduler

TENANTS = "abc"
MAX_LIVE, LONGEST = 8, 12  # requests at once; tokens of a request, prompt and answer
INTERRUPTIONS = (FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.SLOW_READER, FinishReason.SHUTDOWN)


class Laws:
    """A scheduler whose every step is checked."""

    steps: ClassVar[int] = 0  # of all
    longest_wait: ClassVar[float] = 0.0  # as a share of the bound

    def __init__(self, num_blocks: int, block_size: int, token_budget: int, max_running: int) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.pool, token_budget=token_budget, max_running=max_running)
        self.token_budget, self.max_running = token_budget, max_running
        self.live: list[Request] = []
        self.ended: list[Request] = []
        self.ends: Counter[Request] = Counter()
        self.since: dict[Request, int] = {}  # the step at which it was admitted or resumed
        self.leads: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])  # now, least, most

    def admit(self, tenant: str, priority: Priority, prompt: int, answer: int) -> None:
        if len(self.live) == MAX_LIVE or prompt + 1 > self.pool.capacity:
            return
        number = len(self.since)  # also its tokens: no two prompts begin alike
        request = Request(str(number), [number] * prompt, SamplingParams(), answer, tenant=tenant, priority=priority)
        self.scheduler.admit(request)
        self.live.append(request)
        self.since[request] = Laws.steps

    def interrupt(self, request: Request, reason: FinishReason) -> None:
        """It may have ended before: then nothing may come of it."""
        if not request.is_finished:
            self.book_end(request)
        expected = request.finish_reason or reason
        self.scheduler.finish(request, reason)
        assert (request.finish_reason, request.block_ids) == (expected, [])

    def turn(self, request: Request) -> None:
        if request.state is RequestState.RUNNING:
            self.scheduler.pause(request)
        elif request.state is RequestState.PAUSED:
            self.scheduler.resume(request)
            self.since[request] = Laws.steps

    def book_end(self, request: Request) -> None:
        self.live.remove(request)
        self.ended.append(request)
        self.ends[request] += 1

    def step(self, limit: int | None, interrupted: tuple[Request, FinishReason] | None = None) -> None:
        scheduler, before = self.scheduler, list(self.scheduler.running)
        answering = {request.request_id for request in before if request.num_uncomputed == 1}
        fresh = {request for request in scheduler.waiting if not request.has_started}
        plan = scheduler.plan(limit)
        running = {request.request_id: request for request in scheduler.running}
        preempted = {request.request_id for request in before} - running.keys()
        chunks = {chunk.request_id: chunk for chunk in plan.chunks}

        assert bool(chunks) == scheduler.has_work, "some request makes progress in every step"
        assert not running or next(iter(running)) in chunks, "the oldest that runs gets on"
        assert answering <= chunks.keys() | preempted, "every answer goes on"
        assert len(chunks) <= len(running) <= self.max_running
        assert plan.num_tokens <= self.token_budget
        reading = [request for name, request in running.items() if name not in answering]
        if fresh and scheduler.waiting and not preempted:
            self._check_places(fresh, running)
        if not reading or preempted:  # what was granted to the preempted is lost
            self.leads.clear()
        else:
            self._check_shares(reading, chunks)

        result = StepResult(tuple((SampledToken(1),) if chunk.samples else () for chunk in plan.chunks))
        if interrupted is not None:
            self.interrupt(*interrupted)
        for advance in scheduler.commit(plan, result):
            if advance.request.is_finished:
                self.book_end(advance.request)
        Laws.steps += 1
        if Laws.steps % 16 == 0:
            scheduler.check_integrity()
            self._check_waits()

    def _check_places(self, fresh: set[Request], running: dict[str, Request]) -> None:
        """Whoever started for the first time is of a tenant that held no more places than any that still waits."""
        started = [request for request in running.values() if request in fresh]
        places = Counter(request.tenant for request in running.values())
        fewest = min(places[request.tenant] for request in self.scheduler.waiting)
        assert all(places[request.tenant] - 1 <= fewest for request in started)

    def _check_shares(self, reading: list[Request], chunks: dict[str, Chunk]) -> None:
        """Of two tenants that have had prompts to read all the while, none ever gained more on the other than the
        tokens of one step.
        """
        had, left = dict.fromkeys(TENANTS, 0), dict.fromkeys(TENANTS, 0)
        for request in reading:
            chunk = chunks.get(request.request_id)
            length = chunk.length if chunk else 0
            had[request.tenant] += length
            left[request.tenant] += request.num_uncomputed - length
        for pair in combinations(TENANTS, 2):
            if not (left[pair[0]] and left[pair[1]]):
                self.leads.pop(pair, None)
                continue
            lead = self.leads[pair]
            lead[0] += had[pair[0]] - had[pair[1]]
            lead[1], lead[2] = min(lead[1], lead[0]), max(lead[2], lead[0])
            assert lead[2] - lead[1] <= self.token_budget, lead

    def _check_waits(self) -> None:
        """No request that is not paused lives longer than this, whatever comes after it."""
        bound = 4 * MAX_LIVE * self.max_running * LONGEST
        for request in self.live:
            if request.state is not RequestState.PAUSED:
                wait = (Laws.steps - self.since[request]) / bound
                assert wait <= 1, (request, bound)
                Laws.longest_wait = max(Laws.longest_wait, wait)

    def end(self) -> None:
        for _ in range(4 * MAX_LIVE * self.max_running * LONGEST):
            for request in list(self.scheduler.paused):
                self.turn(request)
            if not self.live:
                break
            self.step(None)
        assert not self.live
        assert self.pool.num_active == 0
        assert all(count == 1 for count in self.ends.values())
        assert all(request.is_finished for request in self.ended)


class SchedulerMachine(RuleBasedStateMachine):
    laws: Laws

    @initialize(
        num_blocks=st.integers(1, 16),
        block_size=st.sampled_from((1, 2, 4)),
        spare=st.integers(len(TENANTS), 16),
        max_running=st.integers(1, 3),
    )
    def begin(self, num_blocks: int, block_size: int, spare: int, max_running: int) -> None:
        self.laws = Laws(num_blocks, block_size, max_running + spare, max_running)

    @rule(
        tenant=st.sampled_from(TENANTS),
        priority=st.sampled_from(Priority),
        prompt=st.integers(1, LONGEST - 1),
        answer=st.integers(1, LONGEST),
    )
    def admit(self, tenant: str, priority: Priority, prompt: int, answer: int) -> None:
        self.laws.admit(tenant, priority, prompt, min(answer, LONGEST - prompt))

    @precondition(lambda self: self.laws.live or self.laws.ended)
    @rule(data=st.data(), reason=st.sampled_from(INTERRUPTIONS))
    def interrupt(self, data: st.DataObject, reason: FinishReason) -> None:
        self.laws.interrupt(data.draw(st.sampled_from(self.laws.live + self.laws.ended[-3:])), reason)

    @precondition(lambda self: self.laws.live)
    @rule(data=st.data())
    def turn(self, data: st.DataObject) -> None:
        self.laws.turn(data.draw(st.sampled_from(self.laws.live)))

    @rule(limit=st.none() | st.integers(len(TENANTS), 20))
    def step(self, limit: int | None) -> None:
        self.laws.step(limit)

    @rule(
        seed=st.integers(0, 2**32),
        steps=st.integers(1, 12_000),
        arrivals=st.floats(0.05, 1),
        high=st.floats(0, 1),
        flood=st.floats(0, 1),
        pauses=st.sampled_from((0, 0, 0.1)),
    )
    def storm(self, seed: int, steps: int, arrivals: float, high: float, flood: float, pauses: float) -> None:
        """Many random events; most of what arrives may be one tenant's and of high priority."""
        laws, chance = self.laws, random.Random(seed)
        for _ in range(steps):
            if chance.random() < arrivals:
                tenant = "a" if chance.random() < flood else chance.choice(TENANTS)
                priority = Priority.HIGH if chance.random() < high else chance.choice(tuple(Priority))
                prompt = chance.randint(1, LONGEST - 1)
                laws.admit(tenant, priority, prompt, chance.randint(1, LONGEST - prompt))
            if laws.scheduler.paused and chance.random() < 0.3:
                laws.turn(laws.scheduler.paused[0])
            interrupted = None
            if laws.live and chance.random() < 0.05:
                interrupted = (chance.choice(laws.live), chance.choice(INTERRUPTIONS))
            if laws.live and chance.random() < pauses:
                laws.turn(chance.choice(laws.live))
            laws.step(chance.choice((None, len(TENANTS), 8)), interrupted)

    def teardown(self) -> None:
        if hasattr(self, "laws"):
            self.laws.end()


@pytest.mark.slow
def test_the_laws_hold_whatever_happens_over_about_a_million_steps() -> None:
    Laws.steps = 0
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=105,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # a storm does not shrink, its seed is what one needs
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{Laws.steps} steps; the longest life was {Laws.longest_wait:.2f} of its bound")  # noqa: T201
    assert Laws.steps >= 800_000
