"""Slow readers: a stream that gRPC does not take tokens from leaves the batch, comes back when it does, or ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pagestream.server.job import Job
from pagestream.server.metrics import Metrics
from pagestream.server.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class ReaderLimits:
    """How far behind a reader may be, and for how long."""

    max_unread_tokens: int = 256  # per stream; beyond gRPC's and the network's own buffers
    max_pause_seconds: float = 30.0


class Backpressure:
    """Counts the tokens of each stream that were published and not taken. Used by the engine's thread alone.

    A stream pauses when it has as many as it may and resumes when half of them are taken, so that it does not change
    state with each token. So what waits for all readers together is at most streams times the limit
    and what one step brings.
    """

    def __init__(
        self, limits: ReaderLimits, scheduler: Scheduler, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self._paused: dict[Job, float] = {}  # since when, earliest first

    @property
    def next_expiry(self) -> float | None:
        """When the first of the paused streams will have been so for too long."""
        return min(map(self._expiry, self._paused), default=None)

    def expired(self) -> list[Job]:
        """The streams that have been paused for too long."""
        now = self._clock()
        return [job for job in self._paused if self._expiry(job) <= now]

    def published(self, job: Job, tokens: int) -> None:
        """So many more tokens of a live stream, those of one step, are on their way."""
        job.unread += tokens
        if job.unread >= self._limits.max_unread_tokens:
            self._scheduler.pause(job.request)
            self._paused[job] = self._clock()

    def read(self, job: Job, tokens: int) -> None:
        """So many were taken; the stream may have ended meanwhile."""
        job.unread -= tokens
        if job in self._paused and job.unread <= self._limits.max_unread_tokens // 2:
            self.forget(job)
            job.last_token = self._clock()  # a pause is no gap between tokens: the reader made it
            self._scheduler.resume(job.request)

    def forget(self, job: Job) -> None:
        """The pause of a stream ends, one way or the other; a no-op if it is not paused."""
        since = self._paused.pop(job, None)
        if since is not None:
            self._metrics.observe_pause(self._clock() - since)

    def _expiry(self, job: Job) -> float:
        return self._paused[job] + self._limits.max_pause_seconds
