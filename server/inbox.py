"""The door between the engine's thread and all others: the only state they share, under one lock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pagestream.server.errors import DuplicateRequestError, QueueFullError, RequestError
from pagestream.server.job import Job


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait before newcomers are refused."""

    max_requests: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Mail:
    """What arrived since the engine last looked."""

    arrivals: list[Job]
    cancels: list[tuple[Job, float]]  # and when the cancel was seen
    reads: list[tuple[Job, int]]  # and how many of its tokens gRPC took
    stopping: bool


class Inbox:
    """Refuses at once what cannot be taken on, so that nothing is held for a refused request."""

    def __init__(self, limits: QueueLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._changed = threading.Condition()
        self._arrivals: list[Job] = []
        self._cancels: list[tuple[Job, float]] = []
        self._reads: list[tuple[Job, int]] = []
        self._live: set[str] = set()  # ids of all requests that were taken on and have not ended
        self._waiting_requests = 0  # arrivals and the scheduler's queue
        self._waiting_tokens = 0
        self._seconds_per_token = 0.0
        self._refusal: RequestError | None = None
        self._stopping = False

    # ---- any thread

    def check_open(self) -> int:
        """How many requests wait. Raises what `submit` would raise whatever the request: cheap enough to ask before
        tokenising."""
        with self._changed:
            return self._check_open()

    def submit(self, job: Job) -> int:
        """Takes a request on and returns how many wait ahead of it. Raises DuplicateRequestError, QueueFullError or the
        refusal in force."""
        with self._changed:
            ahead = self._check_open()
            if job.request.request_id in self._live:
                raise DuplicateRequestError(f"request_id {job.request.request_id!r} belongs to a request still running")
            tokens = self._waiting_tokens + job.request.num_prompt_tokens
            if ahead and tokens > self._limits.max_tokens:
                raise self._queue_full()
            self._live.add(job.request.request_id)
            self._arrivals.append(job)
            self._waiting_requests += 1
            self._waiting_tokens = tokens
            self._changed.notify()
        return ahead

    def cancel(self, job: Job) -> None:
        """Asks for the end of a request before the next step. The engine leaves alone one that has ended."""
        with self._changed:
            self._cancels.append((job, self._clock()))
            self._changed.notify()

    def acknowledge(self, job: Job, tokens: int) -> None:
        """So many tokens of a stream have been taken by gRPC."""
        with self._changed:
            self._reads.append((job, tokens))
            self._changed.notify()

    def refuse(self, refusal: RequestError) -> None:
        """Every newcomer gets this refusal from now on."""
        with self._changed:
            self._refusal = refusal

    @property
    def num_live(self) -> int:
        """Requests that were taken on and have not ended."""
        return len(self._live)

    @property
    def refusal(self) -> RequestError | None:
        return self._refusal

    @property
    def predicted_wait(self) -> float:
        """Seconds until what waits now is read, from 1 to 60."""
        return min(max(self._waiting_tokens * self._seconds_per_token, 1.0), 60.0)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def _check_open(self) -> int:
        if self._refusal is not None:
            raise self._refusal
        if self._waiting_requests >= self._limits.max_requests:
            raise self._queue_full()
        return self._waiting_requests

    def _queue_full(self) -> QueueFullError:
        text = f"{self._waiting_requests} requests with {self._waiting_tokens} prompt tokens are waiting"
        return QueueFullError(text, self.predicted_wait)

    # ---- the engine's thread

    def take(self, wait_seconds: float | None) -> Mail:
        """Everything that arrived. Waits so long for the first thing to arrive; None waits for ever."""
        with self._changed:
            self._changed.wait_for(self._has_mail, wait_seconds)
            mail = Mail(self._arrivals, self._cancels, self._reads, self._stopping)
            self._arrivals, self._cancels, self._reads = [], [], []
        return mail

    def _has_mail(self) -> bool:
        return bool(self._arrivals or self._cancels or self._reads or self._stopping)

    def forget(self, request_id: str) -> None:
        """The request has ended: its id may be used again."""
        with self._changed:
            self._live.discard(request_id)

    def settle(self, waiting_requests: int, waiting_tokens: int, seconds_per_token: float) -> None:
        """What the scheduler's queue holds after a step, and how fast it is worked off."""
        with self._changed:
            self._waiting_requests = waiting_requests + len(self._arrivals)
            self._waiting_tokens = waiting_tokens + sum(job.request.num_prompt_tokens for job in self._arrivals)
            self._seconds_per_token = seconds_per_token
