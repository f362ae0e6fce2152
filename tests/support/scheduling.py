"""What stands in for a model beneath the scheduler: pages that remember what was computed, and a driver."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pagestream.model.step import Chunk, SampledToken, SamplingParams, StepPlan, StepResult
from pagestream.server.block_pool import BlockPool
from pagestream.server.errors import PromptExceedsKvCapacityError
from pagestream.server.prompt_lookup import PromptLookup
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
    """Remembers for every slot of every page what a KV cache does: something that depends on the token there and on
    what was found for all before it.
    """

    block_size: int
    slots: dict[tuple[int, int], int] = field(default_factory=dict)

    def step(self, plan: StepPlan) -> StepResult:
        self._copy(plan)
        written = [self._slot(chunk, p) for chunk in plan.chunks for p in range(chunk.start, chunk.end)]
        assert len(written) == len(set(written)), "two chunks write to one slot"
        return StepResult(tuple(map(self._run, plan.chunks)))

    def _copy(self, plan: StepPlan) -> None:
        copies = [
            (self._slot(chunk, chunk.start)[0], chunk.copy_from) for chunk in plan.chunks if chunk.copy_from is not None
        ]
        assert not {target for target, _ in copies} & {source for _, source in copies}, "a page is source and target"
        for target, source in copies:
            for offset in range(self.block_size):
                self.slots[target, offset] = self.slots.get((source, offset), -1)

    def _run(self, chunk: Chunk) -> tuple[SampledToken, ...]:
        tokens = [*chunk.tokens, *chunk.proposed]
        sampled: list[SampledToken] = []
        value = self.slots[self._slot(chunk, chunk.start - 1)] if chunk.start else 0
        assert value == zlib.crc32(bytes(chunk.tokens[: chunk.start])), "a chunk reads what was not computed for it"
        for position in range(chunk.start, chunk.end):
            value = zlib.crc32(bytes([tokens[position]]), value)
            self.slots[self._slot(chunk, position)] = value
            if position + 1 in chunk.sampled_positions:
                sampled.append(SampledToken(value % VOCABULARY))
        expected = 0
        for position in range(chunk.end):
            expected = zlib.crc32(bytes([tokens[position]]), expected)
            assert self.slots[self._slot(chunk, position)] == expected, "a page was written by another"
        return tuple(sampled)

    def _slot(self, chunk: Chunk, position: int) -> tuple[int, int]:
        return chunk.block_ids[position // self.block_size], position % self.block_size

    def forget(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            for offset in range(self.block_size):
                self.slots.pop((block_id, offset), None)


class Guesses(PromptLookup):
    """Knows what comes next, and gets it wrong now and then."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._chance = random.Random(seed)

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        guessed = list(tokens)
        for _ in range(min(self._chance.randrange(5), limit)):
            guessed.append(next_token(guessed) if self._chance.random() < 0.7 else self._chance.randrange(VOCABULARY))
        return guessed[len(tokens) :]


@dataclass
class Simulation:
    """Drives scheduler and runner as the engine does and checks the law after every event."""

    num_blocks: int
    block_size: int
    token_budget: int
    max_running: int
    prefix_cache: bool = True
    speculation: bool = False

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, self.block_size, prefix_cache=self.prefix_cache)
        self.scheduler = Scheduler(
            self.pool, token_budget=self.token_budget, max_running=self.max_running, speculation=self.speculation
        )
        self.runner = PagedRunner(self.block_size)
        self.requests: list[Request] = []  # all that were admitted
        self.events: Counter[str] = Counter()
        self.steps = 0
        self.computed_tokens = 0

    def admit(self, request: Request) -> None:
        request.lookup = Guesses(len(self.requests))
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
        self.runner.forget(self.pool._free)
        live = [*self.scheduler.running, *self.scheduler.waiting]
        running, waiting = [*self.scheduler.running], [*self.scheduler.waiting]
        fresh = {request for request in waiting if not request.has_started}
        answering = {r.request_id for r in self.scheduler.running if r.num_uncomputed == 1 and not r.given}
        plan = self.scheduler.plan()
        self.check()

        preempted = {request.request_id for request in running if request.state is RequestState.WAITING}
        self.events["preempted"] += len(preempted)
        chosen = [chunk.request_id for chunk in plan.chunks]
        assert bool(chosen) == bool(live), "work waits or runs, so the plan is not empty"
        if live:
            assert self.scheduler.running[0].request_id in chosen, "the oldest that runs makes progress in every step"
            # One that comes back from a pause may find the places taken by younger ones; so may one that starts after
            # a younger one of another tenant, whose turn it was.
            if not self.events["resumed"] and len({request.tenant for request in live}) == 1:
                oldest = min(live, key=lambda request: request.arrival)
                assert oldest.request_id in chosen, "the oldest of a single tenant makes progress in every step"
            if not preempted:
                self._check_turns(running, waiting, fresh)
        assert len(set(chosen)) == len(chosen) <= self.max_running
        assert preempted.isdisjoint(chosen)
        assert answering <= preempted | set(chosen), "every answer goes on in every step"
        assert all(chunk.length >= 1 for chunk in plan.chunks)
        assert plan.num_tokens <= self.token_budget
        kinds = [chunk.is_prefill for chunk in plan.chunks]
        assert kinds == sorted(kinds), "tokens of prompts come last"
        prompts = [chunk for chunk in plan.chunks if chunk.is_prefill]
        assert all(chunk.end <= chunk.num_prompt_tokens for chunk in prompts), "and among theirs"

        result = self.runner.step(plan)
        if plan.chunks and self.steps % 3 == 0:  # as after a fault
            again = StepResult(tuple(self.runner.step(StepPlan((chunk,))).sampled[0] for chunk in plan.chunks))
            assert again == result, "a chunk can be run again, alone"
        for request, reason in interrupted_in_flight:
            self.interrupt(request, reason)
        advances = self.scheduler.commit(plan, result)
        self.check()
        assert {advance.request.request_id for advance in advances} <= set(chosen)
        for advance in advances:
            if advance.request.is_finished:
                self.events[advance.request.finish_reason.value] += 1
        self.events["accepted"] += sum(max(len(advance.sampled) - 1, 0) for advance in advances)
        self.events["copied"] += sum(chunk.copy_from is not None for chunk in plan.chunks)
        self.steps += 1
        self.computed_tokens += plan.num_tokens

    def _check_turns(self, running: list[Request], waiting: list[Request], fresh: set[Request]) -> None:
        """Who started, one after another, was due: who had run before, in order of arrival; then, of the tenants that
        held the fewest places, the one whose oldest request is the oldest."""
        places = Counter(request.tenant for request in running)

        def turn(request: Request) -> tuple[bool, int, int | None]:
            return request in fresh, places[request.tenant] if request in fresh else 0, request.arrival

        due: list[Request] = []
        started = {request for request in waiting if request.state is not RequestState.WAITING}
        while len(due) < len(started):
            due.append(min(waiting, key=turn))
            waiting.remove(due[-1])
            places[due[-1].tenant] += 1
        assert set(due) == started, "whoever starts is due"

    def check(self) -> None:
        self.scheduler.check_integrity()
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_active == self.pool.num_blocks
        assert self.pool.num_references == self.scheduler.num_held_references
        waiting = self.scheduler.waiting
        tokens = [(request.tenant, request.num_tokens) for request in waiting]
        assert Counter(dict.fromkeys(waiting.tenants, 0)) + Counter(t for t, _ in tokens) == {
            tenant: demand.requests for tenant, demand in waiting.tenants.items()
        }
        assert sum(n for _, n in tokens) == sum(demand.tokens for demand in waiting.tenants.values())

    def run_to_the_end(self) -> None:
        while self.scheduler.has_work or self.scheduler.paused:
            for request in tuple(self.scheduler.paused):
                self.turn(request)
            self.step()

    def check_answers(self) -> None:
        """At the end nobody holds a block, and every answer is the oracle's, or a beginning of it if interrupted."""
        assert not self.scheduler.has_work
        assert self.pool.num_active == 0
        for request in self.requests:
            tokens, reason = run_alone(request, self.pool.capacity)
            if request.finish_reason in INTERRUPTIONS:
                assert request.tokens == tokens[: len(request.tokens)]
            else:
                assert (request.tokens, request.finish_reason) == (tokens, reason)


def make_request(
    number: int, prompt: list[int], max_new_tokens: int, *, ends: bool = True, tenant: str = ""
) -> Request:
    return Request(
        request_id=str(number),
        prompt=prompt,
        sampling=SamplingParams(),
        max_new_tokens=max_new_tokens,
        eos_token_ids=frozenset({EOS} if ends else ()),
        stop_token_ids=frozenset({STOP} if ends else ()),
        tenant=tenant,
    )
