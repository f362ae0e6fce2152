"""What every step computes: which requests, how many tokens of each, in which blocks. Integers in, a plan out.

The law, and why it holds:

- Running requests followed by waiting ones are always in arrival order: the oldest waiting request starts, the youngest
  running one is preempted, and a preempted one waits in front.
- So the oldest request runs whenever there is one, is never preempted, and is served first in every step. Of requests
  with at most L tokens each, the k-th oldest has finished after k * L steps, whatever arrives later.
- A request starts only with budget that older ones leave over, so only the youngest running one can have more than one
  token to compute: decodes come first, and the budget holds a token for each of them.
- Blocks are released in one place, when a request leaves the running ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pagestream.model.step import Chunk, SampledToken, StepPlan, StepResult
from pagestream.server.block_pool import BlockPool
from pagestream.server.errors import PromptExceedsKvCapacityError
from pagestream.server.request import FinishReason, Request, RequestState


@dataclass(frozen=True, slots=True)
class Advance:
    """What a step did for one request. `sampled` is None while known tokens remain to be computed; whether the request
    has ended, and why, it says itself.
    """

    request: Request
    sampled: SampledToken | None


class Scheduler:
    """Admits, plans, commits and finishes requests. Used by one thread; no call waits for anything.

    Each step spends at most `token_budget` tokens on at most `max_running` requests.
    """

    def __init__(self, pool: BlockPool, *, token_budget: int, max_running: int) -> None:
        if max_running < 1:
            raise ValueError(f"max_running is {max_running}: nothing could ever run")
        if token_budget < max_running:
            raise ValueError(
                f"a token budget of {token_budget} cannot give each of {max_running} running requests its next token"
            )
        self._pool = pool
        self._token_budget = token_budget
        self._max_running = max_running
        self._running: list[Request] = []  # in arrival order, all older than those waiting
        self._waiting: deque[Request] = deque()  # in arrival order
        self._num_admitted = 0
        self._in_flight: tuple[StepPlan, Sequence[Request]] | None = None  # planned, not committed
        self.num_preemptions_total = 0
        self.recomputed_tokens_total = 0  # computed a second time, after a preemption

    @property
    def running(self) -> Sequence[Request]:
        """A live view, in arrival order."""
        return self._running

    @property
    def waiting(self) -> Sequence[Request]:
        """A live view, in arrival order; preempted requests are in front."""
        return self._waiting

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """How many tokens must be computed before every waiting request has its next one."""
        return sum(request.num_tokens for request in self._waiting)

    @property
    def has_work(self) -> bool:
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

    def plan(self) -> StepPlan:
        """Chooses the work of the next step and takes its blocks. Empty only if there is no request."""
        planned: dict[Request, Chunk] = {}
        budget = self._token_budget
        for request in self._next_in_line():
            chunk = self._take_chunk(request, budget)
            if chunk is not None:
                planned[request] = chunk
                budget -= chunk.length
            if budget == 0:
                break
        plan = StepPlan(tuple(planned.values()))
        self._in_flight = (plan, tuple(planned))
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Advance]:
        """Books what the step computed: once, for the latest plan. Requests that finished since it was made are left
        out. Raises ValueError if `plan` or `result` is not of this step.
        """
        if self._in_flight is None or plan is not self._in_flight[0]:
            raise ValueError("only the latest plan can be committed, once")
        requests = self._in_flight[1]
        self._in_flight = None
        return [
            self._advance(request, chunk, sampled)
            for request, chunk, sampled in zip(requests, plan.chunks, result.sampled, strict=True)
            if request.state is RequestState.RUNNING
        ]

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request in any state and frees its blocks at once; a no-op if it has ended.

        A step in flight may still write to those blocks. That is safe because they get a new owner only in the next
        plan, made after the step has run, and an owner writes each position before it reads it.
        """
        if request.is_finished:
            return
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
            self._release_blocks(request)
        elif request in self._waiting:  # not so if it was refused
            self._waiting.remove(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def check_integrity(self) -> None:
        """Raises RuntimeError if the pool, the requests and the queues disagree."""
        self._pool.check_integrity(request.block_ids for request in self._running)
        for queue, state in ((self._running, RequestState.RUNNING), (self._waiting, RequestState.WAITING)):
            for request in queue:
                request.check(self._pool.block_size)
                if request.state is not state:
                    raise RuntimeError(f"request {request.request_id} is {request.state} among those {state}")
        arrivals = [request.arrival or 0 for request in (*self._running, *self._waiting)]
        if any(older >= younger for older, younger in pairwise(arrivals)):
            raise RuntimeError(f"running, then waiting requests are not in arrival order: {arrivals}")
        if len(self._running) > self._max_running:
            raise RuntimeError(f"{len(self._running)} requests run, {self._max_running} may")

    def _next_in_line(self) -> Iterator[Request]:
        """The running requests, then the waiting ones that can start: each chosen after those before it have taken
        their blocks. One that is preempted meanwhile does not start again: some of the blocks it needs are taken.
        """
        for request in tuple(self._running):
            if request.state is RequestState.RUNNING:  # not preempted by an older one just now
                yield request
        while self._can_start():
            yield self._start()

    def _can_start(self) -> bool:
        """Whether the oldest waiting request may start: nothing overtakes it, so it cannot starve.

        It must fit beside all that the running ones still have to compute, with some room for every answer to grow.
        That room is four times larger after each preemption, until whole answers fit. So no request is preempted step
        after step, and none waits for room that answers shorter than allowed never use.
        """
        if not self._waiting or len(self._running) == self._max_running:
            return False
        first = self._waiting[0]
        growth = self._pool.block_size * 4**first.num_preemptions
        wanted = sum(
            self._num_missing_blocks(request, min(request.num_tokens + growth, self._final_length(request)))
            for request in (*self._running, first)
        )
        return wanted <= self._pool.num_free

    def _start(self) -> Request:
        request = self._waiting.popleft()
        request.state = RequestState.RUNNING
        self._running.append(request)
        return request

    def _take_chunk(self, request: Request, budget: int) -> Chunk | None:
        """As many tokens as the budget allows, with their blocks, which the youngest requests make room for. None if
        `request` was the youngest itself and is preempted.
        """
        length = min(request.num_uncomputed, budget)
        missing = self._num_missing_blocks(request, request.num_computed + length)
        while missing > self._pool.num_free:
            if self._preempt_youngest() is request:
                return None
        request.block_ids.extend(self._pool.allocate(missing))
        return Chunk(
            request_id=request.request_id,
            tokens=request.tokens,
            num_prompt_tokens=request.num_prompt_tokens,
            start=request.num_computed,
            length=length,
            block_ids=request.block_ids,
            sampling=request.sampling,
        )

    def _num_missing_blocks(self, request: Request, num_tokens: int) -> int:
        return self._pool.blocks_for(num_tokens) - len(request.block_ids)

    def _final_length(self, request: Request) -> int:
        """The most tokens `request` will ever hold in the cache: its last token is never computed."""
        return min(request.num_prompt_tokens + request.max_new_tokens - 1, self._pool.capacity)

    def _preempt_youngest(self) -> Request:
        """Makes it wait without blocks. It keeps its tokens, whose keys and values will be computed again."""
        request = self._running.pop()
        self._release_blocks(request)
        request.num_computed_before = max(request.num_computed_before, request.num_computed)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions_total += 1
        request.state = RequestState.WAITING
        self._waiting.appendleft(request)
        return request

    def _release_blocks(self, request: Request) -> None:
        self._pool.release(request.block_ids)
        request.block_ids = []  # a new list: a chunk in flight still reads the old one

    def _advance(self, request: Request, chunk: Chunk, sampled: SampledToken | None) -> Advance:
        if chunk.samples != (sampled is not None):
            raise ValueError(f"the result for request {request.request_id} does not answer its chunk")
        self.recomputed_tokens_total += max(0, min(chunk.end, request.num_computed_before) - chunk.start)
        request.num_computed = chunk.end
        if sampled is not None:
            request.tokens.append(sampled.token_id)
            reason = self._reason_to_finish(request, sampled.token_id)
            if reason is not None:
                self.finish(request, reason)
        return Advance(request, sampled)

    def _reason_to_finish(self, request: Request, token_id: int) -> FinishReason | None:
        if token_id in request.eos_token_ids:
            return FinishReason.END_OF_SEQUENCE
        if token_id in request.stop_token_ids:
            return FinishReason.STOP_TOKEN
        if request.num_output_tokens >= request.max_new_tokens:
            return FinishReason.MAX_CONTEXT if request.max_tokens_is_capacity else FinishReason.MAX_TOKENS
        if request.num_tokens > self._pool.capacity:  # it could never be computed
            return FinishReason.MAX_CONTEXT
        return None
