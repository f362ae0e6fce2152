"""The door between the engine's thread and all others: the only state they share, under one lock."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from pagestream.server.errors import DuplicateRequestError, QueueFullError, RequestError
from pagestream.server.job import Job
from pagestream.server.queue_share import QueueShare
from pagestream.server.waiting import Demand

T = TypeVar("T")


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
    questions: list[Callable[[], None]]  # to be answered between two steps
    stop: float | None  # when the engine was told to stop, if it was


class Inbox:
    """Refuses at once what cannot be taken on, so that nothing is held for a refused request."""

    def __init__(self, limits: QueueLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._share = QueueShare(limits.max_requests, limits.max_tokens)
        self._clock = clock
        self._changed = threading.Condition()
        self._arrivals: list[Job] = []
        self._cancels: list[tuple[Job, float]] = []
        self._reads: list[tuple[Job, int]] = []
        self._questions: list[Callable[[], None]] = []
        self._live: set[str] = set()  # ids of all requests that were taken on and have not ended
        self._entering: Counter[str] = Counter()  # requests whose prompts are being tokenised, by tenant
        self._waiting: dict[str, Demand] = {}  # arrivals and the scheduler's queue, by tenant
        self._waiting_requests = 0
        self._waiting_tokens = 0
        self._predicted_wait = 0.0
        self._seconds_per_token = 0.0
        self._refusal: RequestError | None = None
        self._stop: float | None = None

    # ---- any thread

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._waiting_requests

    @contextmanager
    def entering(self, tenant: str, fewest_tokens: int, answers: int = 1) -> Iterator[None]:
        """Holds a place in the queue for each answer while a prompt of at least so many tokens is tokenised; `submit`
        belongs inside. Raises at once what `submit` would raise whatever the prompt turns out to be."""
        with self._changed:
            self._share.saw(tenant, self._clock())
            self._check_open(tenant, self._entering, answers, answers * fewest_tokens)
            self._entering[tenant] += answers
        try:
            yield
        finally:
            with self._changed:
                self._entering -= Counter({tenant: answers})

    def submit(self, *jobs: Job) -> int:
        """Takes on all answers to a prompt, or none, and returns how many requests wait ahead of them. Raises
        DuplicateRequestError, QueueFullError or the refusal in force."""
        with self._changed:
            ahead, tokens = self._waiting_requests, sum(job.request.num_prompt_tokens for job in jobs)
            tenant = jobs[0].request.tenant
            self._check_open(tenant, {}, len(jobs), tokens)
            ids = [job.request.request_id for job in jobs]
            if not self._live.isdisjoint(ids):
                raise DuplicateRequestError(f"request_id {ids[0]!r} belongs to a request still running")
            self._live.update(ids)
            self._arrivals += jobs
            self._count(tenant, len(jobs), tokens)
            self._predicted_wait += tokens * self._seconds_per_token
            self._changed.notify()
        return ahead

    def cancel(self, *jobs: Job) -> None:
        """Asks for the end of all answers to a prompt before the next step. The engine leaves alone what has ended."""
        with self._changed:
            now = self._clock()
            self._cancels += [(job, now) for job in jobs]
            self._changed.notify()

    def acknowledge(self, job: Job, tokens: int) -> None:
        """So many tokens of a stream have been taken by gRPC."""
        with self._changed:
            self._reads.append((job, tokens))
            self._changed.notify()

    def ask(self, question: Callable[[], T]) -> Future[T]:
        """Has the engine's thread answer between two steps. Raises the refusal in force."""
        answer: Future[T] = Future()

        def run() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(question())
                except Exception as error:  # noqa: BLE001 - whoever asked is told
                    answer.set_exception(error)

        with self._changed:
            if self._refusal is not None:
                raise self._refusal
            self._questions.append(run)
            self._changed.notify()
        return answer

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
        """Seconds until what there is to read now is read, from 1 to 60."""
        return min(max(self._predicted_wait, 1.0), 60.0)

    def stop(self) -> None:
        with self._changed:
            self._stop = self._clock()
            self._changed.notify()

    def _check_open(self, tenant: str, entering: Mapping[str, int], answers: int, tokens: int) -> None:
        """Whether so many more answers to prompts of so many tokens together may wait, beside what waits and what is
        `entering`. An empty queue takes a prompt of any length and any number of answers."""
        if self._refusal is not None:
            raise self._refusal
        waiting, limits = self._waiting_requests, self._limits
        ahead = waiting + sum(entering.values())
        text = f"{ahead} requests with {self._waiting_tokens} prompt tokens are waiting"
        if (ahead and ahead + answers > limits.max_requests) or (
            waiting and self._waiting_tokens + tokens > limits.max_tokens
        ):
            raise QueueFullError(text, self.predicted_wait)
        if self._share.exceeds(tenant, self._waiting, answers + entering.get(tenant, 0), tokens):
            own = self._waiting[tenant]
            text = f"{text}, {own.requests} with {own.tokens} of them this client's, whose share of the queue is full"
            raise QueueFullError(text, self.predicted_wait)

    def _count(self, tenant: str, requests: int, tokens: int) -> None:
        demand = self._waiting.get(tenant, Demand())
        self._waiting[tenant] = Demand(demand.requests + requests, demand.tokens + tokens)
        self._waiting_requests += requests
        self._waiting_tokens += tokens

    # ---- the engine's thread

    def take(self, wait_seconds: float | None) -> Mail:
        """Everything that arrived. Waits so long for the first thing to arrive; None waits for ever."""
        with self._changed:
            if wait_seconds != 0:
                self._changed.wait_for(self._has_mail, wait_seconds)
            mail = Mail(self._arrivals, self._cancels, self._reads, self._questions, self._stop)
            self._arrivals, self._cancels, self._reads, self._questions = [], [], [], []
        return mail

    def _has_mail(self) -> bool:
        mail = self._arrivals or self._cancels or self._reads or self._questions
        return bool(mail) or self._stop is not None

    def forget(self, request_id: str) -> None:
        """The request has ended: its id may be used again."""
        with self._changed:
            self._live.discard(request_id)

    def settle(self, waiting: Mapping[str, Demand], seconds: float, seconds_per_token: float) -> None:
        """What the scheduler's queue holds after a step, how soon it will be read, and what each new token adds."""
        with self._changed:
            self._waiting = dict(waiting)
            self._waiting_requests = sum(demand.requests for demand in waiting.values())
            self._waiting_tokens = sum(demand.tokens for demand in waiting.values())
            self._predicted_wait = seconds
            self._seconds_per_token = seconds_per_token
            for job in self._arrivals:
                self._count(job.request.tenant, 1, job.request.num_prompt_tokens)
                self._predicted_wait += job.request.num_prompt_tokens * seconds_per_token
