"""What every step computes: which requests, how many tokens of each, in which blocks. Integers in, a plan out.

The law, and why it holds:

- Whose turn it is to start, `places.py` says; while it does not fit (`admission.py`), none starts. The youngest is
  preempted, and whoever waits again waits at its place by arrival.
- So the oldest running request is never preempted and gets on in every step. Of R places and requests with at most L
  tokens each, some request starts in any R * L steps in which one waits, since without starts all have ended by then.
- Within one tenant and priority, and without pauses, requests start in order of arrival: the oldest runs whenever there
  is one, and the k-th oldest has finished after k * L steps, whatever arrives later. With priorities, one of four
  starts is the oldest's: where blocks suffice, it has finished after k * (4 * R + 1) * L steps.
- A request that is paused keeps its place. It counts as work again when it is resumed. It may then find younger ones
  running where it was, but none starts before it.
- Decodes come first, and the budget holds a token for each running request. What they leave over, less if the caller
  limits it, the prompts that run share (`fair_share.py`): the oldest always gets some, and short ones need not wait for
  long ones. So a request starts as soon as there is room for it, not only when older prompts are read.
- One that starts after another has no turn until that one's first token is made, a number of steps that is bounded too.
- Only running requests hold blocks (`request_blocks.py`). What the others have computed is in the prefix cache until
  the room is needed, so that a preemption costs what has been evicted when its request starts again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pagestream.model.step import Chunk, SampledToken, StepPlan, StepResult
from pagestream.server import given, request_blocks
from pagestream.server.admission import Admission
from pagestream.server.block_pool import BlockPool
from pagestream.server.errors import PromptExceedsKvCapacityError
from pagestream.server.fair_share import FairShare
from pagestream.server.places import next_in_turn, take_turn
from pagestream.server.request import FinishReason, Request, RequestState
from pagestream.server.speculation import accept, add_proposals
from pagestream.server.waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class Advance:
    """What a step did for one request. `sampled` is empty while known tokens remain to be computed, and more than one
    token if proposed ones were right; whether the request has ended, at the last of them, and why, it says itself.
    """

    request: Request
    sampled: tuple[SampledToken, ...]


class Scheduler:
    """Admits, plans, commits and finishes requests. Used by one thread; no call waits for anything.

    Each step spends at most `token_budget` tokens on at most `max_running` requests. With `speculation`, a few of them
    may be tokens that are not known yet.
    """

    def __init__(self, pool: BlockPool, *, token_budget: int, max_running: int, speculation: bool = False) -> None:
        if max_running < 1:
            raise ValueError(f"max_running is {max_running}: nothing could ever run")
        if token_budget < max_running:
            raise ValueError(
                f"a token budget of {token_budget} cannot give each of {max_running} running requests its next token"
            )
        self._pool = pool
        self.token_budget = token_budget
        self.max_running = max_running
        self._speculation = speculation
        self._running: list[Request] = []  # these three in arrival order
        self._waiting = WaitingQueue()
        self._paused: list[Request] = []
        self._fair_share = FairShare()
        self._admission = Admission(pool)
        self._num_admitted = 0
        self._in_flight: tuple[StepPlan, Sequence[Request]] | None = None  # planned, not committed
        self.num_preemptions_total = 0
        self.recomputed_tokens_total = 0  # computed a second time, after a preemption or a pause
        self.queried_tokens_total = 0  # prompt tokens looked up in the prefix cache, once per request
        self.hit_tokens_total = 0  # and found there

    @property
    def running(self) -> Sequence[Request]:
        """A live view, in arrival order."""
        return self._running

    @property
    def waiting(self) -> WaitingQueue:
        """A live view, in arrival order."""
        return self._waiting

    @property
    def paused(self) -> Sequence[Request]:
        """A live view, in arrival order."""
        return self._paused

    @property
    def num_held_references(self) -> int:
        """How many references to blocks the requests have to give back: those of the pool, unless some are lost."""
        return sum(map(len, map(request_blocks.held, self._running)))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """How many tokens must be computed before every waiting request has its next one."""
        return sum(total.tokens for total in self._waiting.totals)

    @property
    def has_work(self) -> bool:
        """Whether the next plan has something to do: a paused request has not."""
        return bool(self._running or self._waiting)

    def admit(self, request: Request) -> None:
        """Puts a new request at the end of the queue. Raises PromptExceedsKvCapacityError if its prompt and one more
        token do not fit the whole pool: queued, it would block those behind it for ever.
        """
        if request.arrival is not None:
            raise ValueError(f"request {request.request_id} was admitted before")
        if request.num_tokens + 1 > self._pool.capacity:
            raise PromptExceedsKvCapacityError(request.num_tokens, self._pool.capacity)
        request.arrival = self._num_admitted
        self._num_admitted += 1
        self._waiting.append(request)

    def plan(self, max_prompt_tokens: int | None = None) -> StepPlan:
        """Chooses the work of the next step and takes its blocks. Empty only if there is no request. Beside decodes, it
        reads at most `max_prompt_tokens` of prompts, but never none.
        """
        planned: dict[Request, Chunk] = {}
        for request in [request for request in self._running if request.num_uncomputed == 1 and not request.given]:
            self._plan_chunk(request, 1, planned)
        budget = self.token_budget - len(planned)
        if planned and max_prompt_tokens is not None:
            budget = min(budget, max(max_prompt_tokens, 1))
        while (starting := self._next_to_start()) is not None:
            self._start(starting)
        prompts = [request for request in self._running if request not in planned]
        for request, length in self._fair_share.divide(prompts, budget):
            self._plan_chunk(request, length, planned)
        if self._speculation and not prompts and not self._waiting:
            add_proposals(self._pool, planned, self.token_budget)
        running = [item for item in planned.items() if item[0].state is RequestState.RUNNING]
        chosen = dict(sorted(running, key=lambda item: item[1].is_prefill))
        plan = StepPlan(tuple(chosen.values()))
        self._in_flight = (plan, tuple(chosen))
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Advance]:
        """Books what the step computed: once, for the latest plan. Requests that finished since it was made are left
        out. Raises ValueError if `plan` or `result` is not of this step."""
        if self._in_flight is None or plan is not self._in_flight[0]:
            raise ValueError("only the latest plan can be committed, once")
        requests = self._in_flight[1]
        self._in_flight = None
        return [
            self._advance(request, chunk, sampled)
            for request, chunk, sampled in zip(requests, plan.chunks, result.sampled, strict=True)
            if request.state is RequestState.RUNNING
        ]

    def pause(self, request: Request) -> None:
        """Takes a running request out of the batch. Its blocks stay in the cache until others need them; what a step in
        flight computes for it is computed again."""
        self._running.remove(request)
        self._give_up_blocks(request)
        request.state = RequestState.PAUSED
        insort(self._paused, request, key=_arrival)

    def resume(self, request: Request) -> None:
        """Puts a paused request back to its place in the queue."""
        self._paused.remove(request)
        request.state = RequestState.WAITING
        insort(self._waiting, request, key=_arrival)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request in any state and lets go of its blocks at once; a no-op if it has ended.

        A step in flight may still write to those blocks, but only behind what they are known to hold. That is safe
        because they get a new owner only in the next plan, made after the step has run, and an owner writes each
        position before it reads it.
        """
        if request.is_finished:
            return
        queue = self._queues()[request.state]
        if request in queue:  # not so if it was refused
            queue.remove(request)
        request_blocks.release(self._pool, request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def check_integrity(self) -> None:
        """Raises RuntimeError if the pool, the requests and the queues disagree."""
        self._pool.check_integrity(map(request_blocks.held, self._running))
        if self.waiting_tokens != sum(request.num_tokens for request in self._waiting):
            raise RuntimeError(f"{self.waiting_tokens} tokens are said to wait")
        for state, queue in self._queues().items():
            for request in queue:
                request.check(self._pool.block_size)
                if request.state is not state:
                    raise RuntimeError(f"request {request.request_id} is {request.state} among those {state}")
            arrivals = [_arrival(request) for request in queue]
            if any(older >= younger for older, younger in pairwise(arrivals)):
                raise RuntimeError(f"those {state} are not in arrival order: {arrivals}")
        if len(self._running) > self.max_running:
            raise RuntimeError(f"{len(self._running)} requests run, {self.max_running} may")

    def _queues(self) -> dict[RequestState, list[Request]]:
        return {
            RequestState.RUNNING: self._running,
            RequestState.WAITING: self._waiting,
            RequestState.PAUSED: self._paused,
        }

    def _next_to_start(self) -> Request | None:
        """The waiting request whose turn it is, if it may start: none starts before it, so it cannot starve."""
        ready = [request for request in self._waiting if request.may_start]
        if not ready or len(self._running) == self.max_running:
            return None
        first = next_in_turn(ready, self._running)
        return first if self._admission.fits(first, self._running) else None

    def _start(self, request: Request) -> None:
        take_turn(request, self._waiting)
        self._waiting.remove(request)
        request.state = RequestState.RUNNING
        insort(self._running, request, key=_arrival)
        request_blocks.share_cached(self._pool, request)

    def _plan_chunk(self, request: Request, length: int, planned: dict[Request, Chunk]) -> None:
        """Takes the blocks for the next `length` tokens. If they are too few, the youngest are preempted. Who is so,
        perhaps `request` itself, is in no plan: some of the blocks it needs are taken."""
        if request.state is not RequestState.RUNNING:  # preempted just now
            return
        if request.given and not given.room_to_score(planned.values()):  # those before it have it all, in this step
            return
        request_blocks.take_cached(self._pool, request, length)
        reach = request.answer_start if request.num_computed < request.answer_start else request.num_tokens
        length = min(length, reach - request.num_computed)  # a prompt's tokens have an arithmetic of their own
        if request.given:
            length = given.most_tokens(request, length, planned.values())
        missing = request_blocks.num_missing(self._pool, request, request.num_computed + length)
        while missing > self._pool.num_available:
            if self._preempt_youngest() is request:
                return
        request.block_ids.extend(self._pool.allocate(missing))
        planned[request] = Chunk(
            request_id=request.request_id,
            tokens=request.tokens,
            num_prompt_tokens=request.answer_start,
            start=request.num_computed,
            length=length,
            block_ids=request.block_ids,
            sampling=request.sampling,
            copy_from=request.copy_from,
            given=request.given[len(request.scores) :],
        )

    def _preempt_youngest(self) -> Request:
        """Makes it wait without blocks."""
        request = self._running.pop()
        if request.num_computed:  # else nothing is lost
            request.num_preemptions += 1
            self.num_preemptions_total += 1
        self._give_up_blocks(request)
        request.state = RequestState.WAITING
        insort(self._waiting, request, key=_arrival)
        return request

    def _give_up_blocks(self, request: Request) -> None:
        """It keeps its tokens, and finds their keys and values again as far as nobody has needed the blocks."""
        request_blocks.release(self._pool, request)
        request.num_computed_before = max(request.num_computed_before, request.num_computed)
        request.num_computed = 0

    def _advance(self, request: Request, chunk: Chunk, sampled: tuple[SampledToken, ...]) -> Advance:
        most = len(chunk.sampled_positions)
        if bool(most) != bool(sampled) or len(sampled) > most:
            raise ValueError(f"the result for request {request.request_id} does not answer its chunk")
        if chunk.given:
            sampled = given.collect(request, chunk, sampled)
        else:
            sampled = accept(request, chunk, sampled, self._pool.capacity)
        end = request.num_tokens - 1 if chunk.proposed else chunk.end
        recomputed = max(0, min(end, request.num_computed_before) - chunk.start)
        self.recomputed_tokens_total += recomputed
        self._admission.book(chunk.length, recomputed)
        if request.num_cached is None:
            request.num_cached = chunk.start
            self.queried_tokens_total += request.num_prompt_tokens
            self.hit_tokens_total += chunk.start
        request_blocks.advance(self._pool, request, end)
        if sampled and (reason := request.reason_to_finish(self._pool.capacity)) is not None:
            self.finish(request, reason)
        return Advance(request, sampled)


def _arrival(request: Request) -> int:
    return request.arrival or 0  # admitted, so it has one
