"""The last requests that ended, for the live page: lengths and times, never a text, an id or a tenant."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pagestream.server.events import Timings
from pagestream.server.request import FinishReason, Request

MAX_RECENT = 30


@dataclass(frozen=True, slots=True)
class RecentRequest:
    """Times are seconds; None where the moment was never reached."""

    ended: float  # on the engine's clock
    reason: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    queue: float | None
    prefill: float | None
    mean_gap: float | None
    duration: float


class RecentRequests:
    """A ring of the last MAX_RECENT. Appending and copying are atomic, so threads need no lock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ring: deque[RecentRequest] = deque(maxlen=MAX_RECENT)

    def add(self, reason: FinishReason, request: Request, timings: Timings, duration: float) -> None:
        gaps = timings.gaps
        self._ring.append(
            RecentRequest(
                ended=self._clock(),
                reason=reason.value,
                prompt_tokens=request.num_prompt_tokens,
                cached_tokens=request.num_cached or 0,
                output_tokens=request.num_output_tokens,
                preemptions=request.num_preemptions,
                queue=timings.queue,
                prefill=timings.prefill,
                mean_gap=sum(gaps) / len(gaps) if gaps else None,
                duration=duration,
            )
        )

    def newest_first(self) -> list[tuple[float, RecentRequest]]:
        """Each with its age in seconds."""
        now = self._clock()
        return [(now - request.ended, request) for request in reversed(list(self._ring))]
