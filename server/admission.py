"""When a waiting request fits beside those that run, so that few are preempted and little is computed twice. Integers.

It must fit beside all that the running ones still have to compute, with some room for every answer to grow. That room
is four times larger after each preemption, and whole answers beside a request that was preempted as often as it may:
then nothing that runs can run out of room. So no request is preempted step after step, and none waits for room that
answers shorter than allowed never use. Whole answers, too, as long as too much of what was computed lately had been
computed before: where most answers want most of the pool, guessing does not pay.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagestream.server import request_blocks
from pagestream.server.block_pool import BlockPool
from pagestream.server.request import Request

MAX_PREEMPTIONS = 3  # per request
GROWTH = 4  # pages that every running answer has room for when another request starts
MAX_RECOMPUTED = 0.16  # of the tokens computed lately: beyond, none starts that might preempt or be preempted
_LATELY = 64  # tokens computed lately, in pools full: from there on the counts are halved, so the last 32 always count


class Admission:
    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._computed = self._recomputed = 0.0  # tokens, lately

    def book(self, computed: int, recomputed: int) -> None:
        """A chunk has computed so many tokens, so many of them a second time."""
        self._computed += computed
        self._recomputed += recomputed
        if self._computed > _LATELY * self._pool.capacity:
            self._computed, self._recomputed = self._computed / 2, self._recomputed / 2

    def fits(self, first: Request, running: Sequence[Request]) -> bool:
        """Whether `first` may start beside those that run."""
        candidates = (*running, first)
        most_preemptions = max(request.num_preemptions for request in candidates)
        growth = GROWTH * self._pool.block_size * 4**most_preemptions  # tokens
        if most_preemptions >= MAX_PREEMPTIONS or self._recomputed > MAX_RECOMPUTED * self._computed:
            growth = self._pool.capacity
        wanted = sum(
            request_blocks.num_missing(
                self._pool, request, min(request.num_tokens + growth, request.final_length(self._pool.capacity))
            )
            for request in candidates
        )
        room = self._pool.num_available
        if wanted <= room:  # else what `first` finds in the cache decides, which takes longer to tell
            return True
        return wanted - request_blocks.num_found_in_use(self._pool, first) <= room
