"""The engine: one thread that turns requests into tokens, a step at a time.

A step is: apply what arrived, plan, run, commit, publish. Nothing else touches the scheduler or the runner, so cancels
and deadlines take effect between steps and free their blocks at once. The engine never waits for a client.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pagestream.model.step import SampledToken, StepPlan, StepResult
from pagestream.model.text_stream import TextStream
from pagestream.server.errors import (
    DeadlineExceededError,
    DrainingError,
    DuplicateRequestError,
    EngineFaultError,
    PromptExceedsKvCapacityError,
    QueueFullError,
    RequestError,
)
from pagestream.server.events import Delta, Event, Failed, Finished, Progress, Publication, Timings
from pagestream.server.metrics import EngineSnapshot, Metrics
from pagestream.server.request import FinishReason, Request
from pagestream.server.scheduler import Advance, Scheduler

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # so many steps in a row in which every request fails mean that the device is gone


class Runner(Protocol):
    """What the engine needs of model.runner.Runner."""

    def step(self, plan: StepPlan) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait before newcomers are refused."""

    max_requests: int
    max_tokens: int


class Engine:
    """Owns the scheduler, the runner and the thread they run on.

    `submit`, `cancel`, `drain` and `stop` may be called from any thread. `publish` is called from the engine's thread,
    once per step, with everything the step has to say.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        metrics: Metrics,
        limits: QueueLimits,
        publish: Callable[[Publication], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._metrics = metrics
        self._limits = limits
        self._publish = publish
        self.clock = clock
        self._jobs: dict[str, Job] = {}  # live requests; written under the lock, by the engine's thread and by submit
        self._deadlines: list[tuple[float, str]] = []  # heap
        self._publication: Publication = []
        self._failed_steps = 0
        self._seconds_per_token = 0.0  # smoothed over steps, for RetryInfo

        self._lock = threading.Condition()
        self._arrivals: list[Job] = []
        self._cancels: list[tuple[str, RequestError | FinishReason, float]] = []
        self._waiting_requests = 0  # as of the last step, without arrivals
        self._waiting_tokens = 0
        self._refusal: RequestError | None = None  # set while draining or when the engine is gone
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- called from other threads

    @property
    def num_live(self) -> int:
        return len(self._jobs)

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive() and not isinstance(self._refusal, EngineFaultError)

    def start(self) -> None:
        self._thread.start()

    def check_open(self) -> None:
        """Raises what `submit` would raise whatever the request: cheap enough to ask before tokenising."""
        with self._lock:
            self._check_open()

    def submit(self, job: Job) -> int:
        """Puts a request into the queue and returns how many wait ahead of it.

        Raises DuplicateRequestError, QueueFullError or the refusal of a draining or broken engine, at once; nothing is
        held for a refused request.
        """
        with self._lock:
            ahead = self._check_open()
            if job.request.request_id in self._jobs:
                raise DuplicateRequestError(f"request_id {job.request.request_id!r} belongs to a request still running")
            tokens = self._waiting_tokens + job.request.num_prompt_tokens
            if ahead and tokens > self._limits.max_tokens:
                raise self._queue_full()
            self._jobs[job.request.request_id] = job
            self._arrivals.append(job)
            self._waiting_requests += 1
            self._waiting_tokens = tokens
            self._lock.notify()
        return ahead

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Ends a request before the next step; a no-op for one that is not live."""
        with self._lock:
            if request_id in self._jobs:
                self._cancels.append((request_id, reason, self.clock()))
                self._lock.notify()

    def drain(self, retry_after_seconds: float) -> None:
        """Refuses newcomers from now on; live requests go on."""
        with self._lock:
            self._refusal = DrainingError("the server is shutting down", retry_after_seconds)

    def stop(self) -> None:
        """Ends every live request with the refusal of a draining server, then the thread; returns when it is gone."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join()

    def _check_open(self) -> int:
        if self._refusal is not None:
            raise self._refusal
        if self._waiting_requests >= self._limits.max_requests:
            raise self._queue_full()
        return self._waiting_requests

    def _queue_full(self) -> QueueFullError:
        wait = min(max(self._waiting_tokens * self._seconds_per_token, 1.0), 60.0)
        return QueueFullError(
            f"{self._waiting_requests} requests with {self._waiting_tokens} prompt tokens are waiting", wait
        )

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._expire_deadlines()
                self._step()
                self._flush()
        except Exception:  # noqa: BLE001 - whatever it is, clients must hear of it and readiness must drop
            log.exception("the engine is gone")
            self._refusal = EngineFaultError("the engine has stopped after an internal fault")
        self._end_all()

    def _take_commands(self) -> bool:
        """Waits for work, applies what arrived, and says whether to go on."""
        with self._lock:
            while not (self._arrivals or self._cancels or self._stopping or self._scheduler.has_work):
                self._lock.wait()
            arrivals, self._arrivals = self._arrivals, []
            cancels, self._cancels = self._cancels, []
            stopping = self._stopping
        for job in arrivals:
            self._scheduler.admit(job.request)
            if job.deadline is not None:
                heapq.heappush(self._deadlines, (job.deadline, job.request.request_id))
        for request_id, reason, since in cancels:
            job_or_none = self._jobs.get(request_id)
            if job_or_none is not None:
                self._end(job_or_none, reason)
                self._metrics.observe_cancel_release("client", self.clock() - since)
        return not stopping

    def _expire_deadlines(self) -> None:
        now = self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            job = self._jobs.get(request_id)
            if job is None or job.deadline != deadline:  # finished; the id may be in use again
                continue
            error = DeadlineExceededError(f"the deadline of request {request_id} has passed")
            self._end(job, FinishReason.DEADLINE, error)
            self._metrics.observe_cancel_release("deadline", self.clock() - deadline)

    def _step(self) -> None:
        started = self.clock()
        plan = self._scheduler.plan()
        for chunk in plan.chunks:
            job = self._jobs[chunk.request_id]
            if job.first_scheduled is None:
                job.first_scheduled = started
        if plan.chunks:
            result = self._execute(plan)
            now = self.clock()
            self._advance(self._scheduler.commit(plan, result), now)
            self._metrics.observe_step(plan, now - started)
            self._seconds_per_token += 0.1 * ((now - started) / plan.num_tokens - self._seconds_per_token)

    def _execute(self, plan: StepPlan) -> StepResult:
        """Runs the step. If it fails, runs each chunk alone, so that only those at fault end in an error: a chunk may
        run twice, because all it leaves behind are the keys and values of its own positions."""
        try:
            result = self._runner.step(plan)
        except Exception:
            log.exception("a step of %d requests failed; running each alone", len(plan.chunks))
            result = StepResult(tuple(self._execute_alone(chunk) for chunk in plan.chunks))
            every_one_failed = not any(chunk.request_id in self._jobs for chunk in plan.chunks)
            self._failed_steps = self._failed_steps + 1 if every_one_failed else 0
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise
            return result
        self._failed_steps = 0
        return result

    def _execute_alone(self, chunk: Chunk) -> SampledToken | None:
        try:
            return self._runner.step(StepPlan((chunk,))).sampled[0]
        except Exception:
            log.exception("request %s failed", chunk.request_id)
            error = EngineFaultError(f"request {chunk.request_id} failed inside the engine")
            self._end(self._jobs[chunk.request_id], FinishReason.ERROR, error)
            return None

    def _advance(self, advances: Sequence[Advance], now: float) -> None:
        """Turns what a step did into events."""
        contexts: list[int] = []
        gaps: list[float] = []
        for advance in advances:
            request = advance.request
            job = self._jobs[request.request_id]
            if advance.sampled is None:
                progress = job.progress(now)
                if progress is not None:
                    self._publication.append((request.request_id, progress))
                continue
            if job.last_token is not None:
                contexts.append(request.num_tokens)
                gaps.append(now - job.last_token)
            self._publication.append((request.request_id, job.take_token(advance.sampled, now)))
            if len(job.gaps) == 0 and job.first_token == now:
                self._metrics.observe_first_token(request.num_prompt_tokens, job.timings())
            if job.is_finished:
                self._finish(job)
        self._metrics.observe_gaps(contexts, gaps)

    def _finish(self, job: Job) -> None:
        """An answer is complete."""
        finished = job.finished()
        self._publication.append((job.request.request_id, finished))
        self._release(job, finished.reason)

    def _end(self, job: Job, reason: FinishReason, error: RequestError | None = None) -> None:
        """A request ends without an answer; a client that left on its own accord is told nothing."""
        if error is not None:
            self._publication.append((job.request.request_id, Failed(error)))
        self._release(job, reason)

    def _release(self, job: Job, reason: FinishReason) -> None:
        self._scheduler.finish(job.request, reason)
        with self._lock:
            del self._jobs[job.request.request_id]
        self._metrics.observe_finished(reason, job.request, job.timings(), self.clock() - job.received)

    def _flush(self) -> None:
        """Tells the world what happened since the last time."""
        publication, self._publication = self._publication, []
        if publication:
            self._publish(publication)
        with self._lock:
            self._waiting_requests = self._scheduler.num_waiting + len(self._arrivals)
            self._waiting_tokens = self._scheduler.waiting_tokens + sum(j.request.num_prompt_tokens for j in self._arrivals)
        self._metrics.snapshot = take_snapshot(self._scheduler, self._jobs, self.clock())

    def _end_all(self) -> None:
        """Fails what is left when the thread ends. Blocks need no freeing: the pool ends with the thread."""
        with self._lock:
            refusal = self._refusal or DrainingError("the server is shutting down", 1.0)
            self._refusal = refusal
            jobs = list(self._jobs.values())
            self._jobs.clear()
        reason = FinishReason.ERROR if isinstance(refusal, EngineFaultError) else FinishReason.SHUTDOWN
        for job in jobs:
            self._publication.append((job.request.request_id, Failed(refusal)))
            self._metrics.observe_finished(reason, job.request, job.timings(), self.clock() - job.received)
        self._publish(self._publication)
