"""What counts as good enough: objectives for the times of a request, and whether it met them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pagestream.server.events import Timings, nearest_rank
from pagestream.server.request import FinishReason

Objective = Literal["ttft", "itl", "e2e"]

_JUDGED = (  # the others ended by their client's doing, the server's shutdown or as a score
    FinishReason.END_OF_SEQUENCE,
    FinishReason.STOP_STRING,
    FinishReason.STOP_TOKEN,
    FinishReason.MAX_TOKENS,
    FinishReason.MAX_CONTEXT,
    FinishReason.DEADLINE,
    FinishReason.QUEUE_TIMEOUT,
    FinishReason.ERROR,
)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Seconds: to the first token, of the 99th percentile of the gaps between tokens, and from receipt to end."""

    first_token: float = 2.0
    gap: float = 0.1
    end: float = 60.0

    def judge(self, reason: FinishReason, timings: Timings, seconds: float) -> Iterator[tuple[Objective, bool]]:
        """What a request that took `seconds` met and missed; what failed missed its end, and its first token too if it
        never came. Nothing is said of gaps where there are none."""
        if reason not in _JUDGED:
            return
        first = timings.time_to_first_token
        yield "ttft", first is not None and first <= self.first_token
        if timings.gaps:
            yield "itl", (nearest_rank(sorted(timings.gaps), 0.99) or 0.0) <= self.gap
        answered = _JUDGED.index(reason) < _JUDGED.index(FinishReason.DEADLINE)
        yield "e2e", answered and seconds <= self.end
