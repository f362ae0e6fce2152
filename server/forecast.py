"""When a prompt that arrives now will have its first token, and what reading it will cost those that decode.

Assumes what the scheduler does for requests of one tenant and priority: prompts with less left to read go first, but a
quarter of each step is the oldest's; who is read joins those that decode; while anybody decodes, a step reads as much
as `pace.py` lets it. Nothing is known of those who come later, nor of blocks that run out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from pagestream.server.block_pool import BlockPool
from pagestream.server.cost_model import Work, decodes_at, prompt_from
from pagestream.server.pace import MIN_PROMPT_TOKENS, Pace
from pagestream.server.request import Request
from pagestream.server.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Estimate:
    """Times are seconds; None before there is a cost model."""

    prompt_tokens: int
    cached_tokens: int
    queue: float | None  # that the requests before it take
    first_token: float | None  # from now on, the queue included
    stall_for_others: float | None  # summed over the streams that decode now
    gap_after: float | None  # between its own tokens
    extrapolated: bool
    samples: int


class _Ahead(NamedTuple):
    """Of a newcomer: what is read before it is read itself."""

    work: Work
    joining: Work  # the decodes of those who have been read by then, beside those that decode now
    has_company: bool  # others are read together with it


class Forecast:
    """Used by the engine's thread alone; changes nothing."""

    def __init__(self, pace: Pace, scheduler: Scheduler, pool: BlockPool) -> None:
        self._pace = pace
        self._model = pace.model
        self._scheduler = scheduler
        self._pool = pool

    def estimate(self, prompt: Sequence[int], tenant: str, answer_tokens: float, soonest: float = 0.0) -> Estimate:
        """Of a prompt that is not in the queue yet, and no step begins to read before `soonest`; a usual answer has
        `answer_tokens`."""
        found = self._pool.find(tenant, prompt, len(prompt) - 1)
        cached = len(found.block_ids) * self._pool.block_size + found.num_copyable
        return self.of_length(len(prompt), cached, answer_tokens, soonest)

    def of_length(self, num_tokens: int, cached: int, answer_tokens: float, soonest: float = 0.0) -> Estimate:
        """As `estimate`, of a prompt of which so many tokens are cached."""
        model, own = self._model, prompt_from(cached, num_tokens)
        decodes = self._decodes()
        gap_after = model.predict(decodes.beside(decodes_at([num_tokens]))) if model.knows("decode") else None
        queue = first_token = stall = None
        if model.knows("prefill"):
            ahead = self._ahead_of(own.tokens)
            queue = self._wait_for_place(answer_tokens, decodes) + self._seconds(ahead.work, decodes)
            queue = max(queue, soonest)
            beside = decodes.beside(ahead.joining)
            first_token = queue + self._seconds_to_end(own, beside, has_company=ahead.has_company)
            alone = self._num_steps(own, decodes) * model.predict(decodes)
            stall = max(self._seconds(own, decodes) - alone, 0.0) * decodes.rows
        extrapolated = first_token is not None and not model.has_seen(num_tokens)
        samples = model.samples["prefill"]
        return Estimate(num_tokens, cached, queue, first_token, stall, gap_after, extrapolated, samples)

    def next_step(self) -> float:
        """How long the step takes that is about to begin; 0 if there is nothing to do."""
        prompts, decodes = self._prompts(), self._decodes()
        if not prompts.tokens:
            return self._model.predict(decodes) if decodes.rows else 0.0
        limit = self._pace.prompt_tokens(self._scheduler.running)
        most = self._scheduler.token_budget if limit is None else limit
        share = min(most / prompts.tokens, 1.0)
        return self._model.step_seconds(decodes) + share * self._model.prompt_seconds(prompts, decodes)

    def backlog(self, answer_tokens: float) -> float:
        """Seconds until all prompts are read that run or wait now, and one more would have a place; 0 before there is a
        cost model. Beside one answer at least: those who are read begin theirs."""
        prompts, decodes = self._prompts(), self._decodes()
        place = self._wait_for_place(answer_tokens, decodes) if self._scheduler.num_waiting else 0.0
        return place + self._seconds(prompts, decodes if decodes.rows else decodes_at([1]))

    def seconds_per_token(self, prompt_tokens: int) -> float:
        """Of prompts of that length, in a backlog."""
        return self._seconds(prompt_from(0, prompt_tokens), decodes_at([1])) / prompt_tokens

    def _decodes(self) -> Work:
        return decodes_at([request.num_tokens for request in self._scheduler.running if request.num_uncomputed == 1])

    def _prompts(self) -> Work:
        """What is left to read of those that run and those that wait."""
        reading = [request for request in self._scheduler.running if request.num_uncomputed > 1]
        works = [prompt_from(request.num_computed, request.num_tokens) for request in reading]
        works += [Work(tokens=total.tokens, squares=total.squares) for total in self._scheduler.waiting.totals]
        return reduce(Work.beside, works, Work())

    def _ahead_of(self, tokens: int) -> _Ahead:
        """Of a newcomer with so many tokens to read."""
        reading = [request for request in self._scheduler.running if request.num_uncomputed > 1]
        waiting = self._scheduler.waiting.totals
        sooner = [request for request in reading if request.num_uncomputed <= tokens]
        shorter = [total for total in waiting if total.tokens <= tokens * total.requests]  # by their mean
        works = [prompt_from(request.num_computed, request.num_tokens) for request in sooner]
        works += [Work(tokens=total.tokens, squares=total.squares) for total in shorter]
        if reading and reading[0] not in sooner:  # the oldest gets a quarter: a third of what all others get
            oldest, share = reading[0], (tokens + sum(work.tokens for work in works)) // 3
            works.append(prompt_from(oldest.num_computed, min(oldest.num_computed + share, oldest.num_tokens)))
        joining = decodes_at([request.num_tokens for request in sooner])
        joining = joining.beside(Work(sum(t.requests for t in shorter), sum(t.tokens for t in shorter)))
        has_company = len(sooner) + len(shorter) < len(reading) + len(waiting)
        return _Ahead(reduce(Work.beside, works, Work()), joining, has_company)

    def _num_steps(self, work: Work, decodes: Work) -> float:
        """In which the prompts of `work` are read beside these decodes."""
        if not work.tokens:
            return 0.0
        most = max(self._scheduler.token_budget - decodes.rows, 1)
        if not decodes.rows:
            return work.tokens / most
        left = self._pace.seconds_for_prompts(decodes)  # 0 beside decodes of unknown cost, where steps miss the target
        steps = self._model.prompt_seconds(work, decodes) / left if left > 0 else math.inf
        return max(min(steps, work.tokens / MIN_PROMPT_TOKENS), work.tokens / most)

    def _seconds(self, work: Work, decodes: Work) -> float:
        fixed = self._model.step_seconds(decodes)
        return self._num_steps(work, decodes) * fixed + self._model.prompt_seconds(work, decodes)

    def _seconds_to_end(self, work: Work, decodes: Work, *, has_company: bool) -> float:
        """Until the end of the last step, which company fills."""
        steps = self._num_steps(work, decodes)
        whole = max(math.ceil(steps), 1)
        filled = whole / steps if has_company else 1.0
        return whole * self._model.step_seconds(decodes) + filled * self._model.prompt_seconds(work, decodes)

    def _wait_for_place(self, answer_tokens: float, decodes: Work) -> float:
        """Until enough of those that run have ended for all that wait and a newcomer to have a place."""
        running, waiting = self._scheduler.running, self._scheduler.num_waiting
        missing = len(running) + waiting + 1 - self._scheduler.max_running
        if missing <= 0:
            return 0.0
        left = sorted(min(_answer_left(request), answer_tokens) for request in running)
        rounds, place = divmod(missing - 1, self._scheduler.max_running)
        steps = rounds * answer_tokens + left[min(place, len(left) - 1)] if left else 0.0
        return steps * self._model.predict(decodes)


def _answer_left(request: Request) -> int:
    return request.max_new_tokens - request.num_output_tokens
