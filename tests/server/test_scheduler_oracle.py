"""Any schedule gives each request the tokens it gets alone, and the law of the scheduler holds at every step.

The fake runner keeps what a real one keeps, pages, and answers from what it finds there, not from what it is told.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.step import Chunk, SampledToken, SamplingParams, StepPlan, StepResult
from pagestream.server.block_pool import BlockPool
from pagestream.server.errors import PromptExceedsKvCapacityError
from pagestream.server.request import FinishReason, Request, RequestState
from pagestream.server.scheduler import Scheduler

VOCABULARY = 12  # tokens 0 .. 11; small, so that stale pages often hold plausible tokens
EOS, STOP = 0, 1
INTERRUPTIONS = (
    FinishReason.CANCELLED,
    FinishReason.DEADLINE,
    FinishReason.STOP_STRING,
    FinishReason.ERROR,
    FinishReason.SHUTDOWN,
)


def next_token(tokens: Iterable[int]) -> int:
    """The "model": depends on every token and on their order."""
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def run_alone(request: Request, capacity: int) -> tuple[list[int], FinishReason]:
    """The oracle: what the request must answer, without blocks, batches or steps."""
    tokens = list(request.prompt)
    while True:
        tokens.append(next_token(tokens))
        if tokens[-1] in request.eos_token_ids:
            return tokens, FinishReason.END_OF_SEQUENCE
        if tokens[-1] in request.stop_token_ids:
            return tokens, FinishReason.STOP_TOKEN
        if len(tokens) - len(request.prompt) == request.max_new_tokens:
            return tokens, FinishReason.MAX_TOKENS
        if len(tokens) > capacity:
            return tokens, FinishReason.MAX_CONTEXT


@dataclass
class PagedRunner:
    """Remembers (position, token) of every slot of every page, as a KV cache remembers keys and values."""

    block_size: int
    slots: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def step(self, plan: StepPlan) -> StepResult:
        written = [self._slot(chunk, p) for chunk in plan.chunks for p in range(chunk.start, chunk.end)]
        assert len(written) == len(set(written)), "two chunks write to one slot"
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.end):
                self.slots[self._slot(chunk, position)] = (position, chunk.tokens[position])
        return StepResult(tuple(self._sample(chunk) for chunk in plan.chunks))

    def _sample(self, chunk: Chunk) -> SampledToken | None:
        found = [self.slots.get(self._slot(chunk, position)) for position in range(chunk.end)]
        assert found == list(enumerate(chunk.tokens[: chunk.end])), "a chunk reads what was not computed for it"
        return SampledToken(next_token(token for _, token in found)) if chunk.samples else None

    def _slot(self, chunk: Chunk, position: int) -> tuple[int, int]:
        return chunk.block_ids[position // self.block_size], position % self.block_size

    def forget_all_but(self, block_ids: set[int]) -> None:
        self.slots = {slot: content for slot, content in self.slots.items() if slot[0] in block_ids}


@dataclass
class Simulation:
    """Drives scheduler and runner as the engine does and checks the law after every event."""

    num_blocks: int
    block_size: int
    token_budget: int
    max_running: int

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, self.block_size)
        self.scheduler = Scheduler(self.pool, token_budget=self.token_budget, max_running=self.max_running)
        self.runner = PagedRunner(self.block_size)
        self.requests: list[Request] = []  # all that were admitted
        self.events: Counter[str] = Counter()
        self.steps = 0
        self.computed_tokens = 0

    def admit(self, request: Request) -> None:
        fits = len(request.prompt) < self.pool.capacity
        try:
            self.scheduler.admit(request)
            self.requests.append(request)
        except PromptExceedsKvCapacityError:
            assert not fits
        else:
            assert fits
        self.check()

    def interrupt(self, request: Request, reason: FinishReason) -> None:
        """Twice: the second must change nothing."""
        self.events[reason.value] += not request.is_finished
        expected = request.finish_reason or reason
        for again in (reason, FinishReason.CANCELLED):
            self.scheduler.finish(request, again)
            assert request.finish_reason is expected
            self.check()

    def turn(self, request: Request) -> None:
        """Its reader falls behind, or catches up."""
        if request.state is RequestState.RUNNING:
            self.scheduler.pause(request)
        elif request.state is RequestState.PAUSED:
            self.scheduler.resume(request)
            self.events["resumed"] += 1
        self.check()

    def step(self, interrupted_in_flight: Iterable[tuple[Request, FinishReason]] = ()) -> None:
        queues = (self.scheduler.running, self.scheduler.waiting, self.scheduler.paused)
        self.runner.forget_all_but(
            {block_id for queue in queues for request in queue for block_id in request.block_ids}
        )
        live = [*self.scheduler.running, *self.scheduler.waiting]
        running = [*self.scheduler.running]
        answering = {request.request_id for request in self.scheduler.running if request.num_uncomputed == 1}
        preemptions = {request.request_id: request.num_preemptions for request in live}
        plan = self.scheduler.plan()
        self.check()

        preempted = {
            request.request_id for request in running if request.num_preemptions > preemptions[request.request_id]
        }
        self.events["preempted"] += len(preempted)
        chosen = [chunk.request_id for chunk in plan.chunks]
        assert bool(chosen) == bool(live), "work waits or runs, so the plan is not empty"
        if live:
            # One that comes back from a pause may find the places taken by younger ones.
            contenders = self.scheduler.running if self.events["resumed"] else live
            oldest = min(contenders, key=lambda request: request.arrival)
            assert oldest.request_id in chosen, "the oldest request makes progress in every step"
        assert len(set(chosen)) == len(chosen) <= self.max_running
        assert preempted.isdisjoint(chosen)
        assert answering <= preempted | set(chosen), "every answer goes on in every step"
        assert all(chunk.length >= 1 for chunk in plan.chunks)
        assert plan.num_tokens <= self.token_budget
        assert answering.isdisjoint(chosen[len(answering - preempted) :]), "decodes come first"

        result = self.runner.step(plan)
        for request, reason in interrupted_in_flight:
            self.interrupt(request, reason)
        advances = self.scheduler.commit(plan, result)
        self.check()
        assert {advance.request.request_id for advance in advances} <= set(chosen)
        for advance in advances:
            if advance.request.is_finished:
                self.events[advance.request.finish_reason.value] += 1
        self.steps += 1
        self.computed_tokens += plan.num_tokens

    def check(self) -> None:
        self.scheduler.check_integrity()
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_active == self.pool.num_blocks
        assert self.pool.num_active == self.scheduler.num_held_blocks

    def run_to_the_end(self) -> None:
        while self.scheduler.has_work or self.scheduler.paused:
            for request in tuple(self.scheduler.paused):
                self.turn(request)
            self.step()

    def check_answers(self) -> None:
        """After the end: everything is free, and every answer is the oracle's, or a beginning of it if interrupted."""
        assert not self.scheduler.has_work
        assert self.pool.num_free == self.pool.num_blocks
        for request in self.requests:
            tokens, reason = run_alone(request, self.pool.capacity)
            if request.finish_reason in INTERRUPTIONS:
                assert request.tokens == tokens[: len(request.tokens)]
            else:
                assert (request.tokens, request.finish_reason) == (tokens, reason)


def make_request(number: int, prompt: list[int], max_new_tokens: int, *, ends: bool = True) -> Request:
    return Request(
        request_id=str(number),
        prompt=prompt,
        sampling=SamplingParams(),
        max_new_tokens=max_new_tokens,
        eos_token_ids=frozenset({EOS} if ends else ()),
        stop_token_ids=frozenset({STOP} if ends else ()),
    )


@st.composite
def simulations(draw: st.DrawFn) -> Simulation:
    max_running = draw(st.integers(1, 5))
    return Simulation(
        num_blocks=draw(st.integers(1, 10)),
        block_size=draw(st.sampled_from((1, 2, 4))),
        token_budget=draw(st.integers(max_running, max_running + 8)),
        max_running=max_running,
    )


prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20)
arrivals = st.tuples(prompts, st.integers(1, 20), st.booleans())
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
            prompt, max_new_tokens, ends = argument
            simulation.admit(make_request(number, prompt, max_new_tokens, ends=ends))
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
@given(simulations(), st.lists(st.tuples(prompts, st.integers(1, 20)), min_size=1, max_size=8), st.randoms())
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
