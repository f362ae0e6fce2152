"""The engine: one thread that turns requests into tokens, a step at a time.

A step is: apply what arrived, plan, publish the last step, run, commit. Nothing else touches the scheduler or the
runner, so cancels and deadlines take effect between steps and free their blocks at once. It never waits for a client.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from pagestream.model.sampling import NonFiniteLogitsError
from pagestream.server.backpressure import Backpressure, ReaderLimits
from pagestream.server.block_pool import BlockPool
from pagestream.server.cache_watch import CacheWatch
from pagestream.server.costs import Costs, Footprint
from pagestream.server.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineFaultError,
    GaveWayError,
    QueueTimeoutError,
    RequestError,
    SlowReaderError,
)
from pagestream.server.events import Delta
from pagestream.server.execution import Execution, Runner
from pagestream.server.forecast import Estimate
from pagestream.server.inbox import Inbox, QueueLimits
from pagestream.server.job import Job, Publication
from pagestream.server.metrics import Metrics
from pagestream.server.observer import Observer
from pagestream.server.pace import Pace
from pagestream.server.report import report
from pagestream.server.request import FinishReason
from pagestream.server.scheduler import Advance, Scheduler

log = logging.getLogger(__name__)

HANGS_UP_EARLY = 0.05  # seconds before its deadline by our clock: a client's own began when it sent the request


class Engine:
    """Owns the scheduler, the runner and the thread they run on.

    Other threads come in through `inbox` and `stop`. `publish` is called from the engine's thread, once per step, with
    everything the step has to say; `on_fault` once, if the engine breaks and is gone.
    """

    def __init__(
        self,
        pool: BlockPool,
        scheduler: Scheduler,
        runner: Runner,
        metrics: Metrics,
        limits: QueueLimits,
        readers: ReaderLimits,
        pace: Pace,
        observer: Observer,
        publish: Callable[[Publication], None],
        on_fault: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        footprint: Footprint = Footprint(),  # noqa: B008 - frozen
    ) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self._metrics = metrics
        self._costs = Costs(pace, pool, scheduler, metrics, footprint, clock)
        self._observer = observer
        self._publish = publish
        self._on_fault = on_fault
        self.clock = clock
        self.inbox = Inbox(limits, clock)
        self.cache = CacheWatch(pool)
        self._backpressure = Backpressure(readers, scheduler, metrics, clock)
        self._jobs: dict[str, Job] = {}
        self._execution = Execution(runner, self._jobs.__contains__, self._fail)
        self._deadlines: list[tuple[float, str]] = []  # heap, of both kinds of deadline
        self._publication: Publication = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self, retry_after_seconds: float) -> None:
        """Refuses newcomers from now on; live requests go on."""
        self.inbox.refuse(DrainingError("the server is shutting down", retry_after_seconds))

    def estimate(self, prompt: Sequence[int], tenant: str) -> Future[Estimate]:
        """What a prompt would cost now. Any thread may ask. Raises the refusal in force."""
        return self.inbox.ask(lambda: self._costs.estimate(prompt, tenant))

    def stop(self) -> None:
        """Ends every live request as UNAVAILABLE, then the thread; returns when it is gone."""
        self.inbox.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._report()  # so that an idle server's pool is seen to be free
            while (stop := self._turn()) is None:
                pass
            self._shut_down(stop)
        except Exception:  # whatever it is, clients must hear of it and readiness must drop
            log.exception("the engine is gone")
            self._fail_all()
            self._on_fault()

    def _turn(self) -> float | None:
        """Takes what arrived and, unless told to stop, ends what is due and runs a step; returns as `_take_mail`."""
        begun = self.clock() if self._scheduler.has_work else None
        stop = self._take_mail()
        if stop is None:
            begun = self.clock() if begun is None else begun  # waiting for work costs nobody anything
            self._expire_deadlines()
            self._expire_slow_readers()
            self._step()
            self._report()
            self._costs.end_of_turn(self.clock() - begun)
        return stop

    def _take_mail(self) -> float | None:
        """Waits for work, applies what arrived, and says since when it is to stop; None if it is not."""
        mail = self.inbox.take(self._seconds_to_wait())
        for job in mail.arrivals:
            self._jobs[job.request.request_id] = job
            self._costs.predict(job)
            self._scheduler.admit(job.request)
            for deadline in (job.deadline, job.queue_deadline):
                if deadline is not None:
                    heapq.heappush(self._deadlines, (deadline, job.request.request_id))
        if not all(job.internal for job in mail.arrivals):
            self._give_way()
        for job, seen in mail.cancels:
            if not job.is_finished:  # it may have ended by itself meanwhile
                if job.deadline is not None and seen >= job.deadline - HANGS_UP_EARLY:
                    self._end_late(job, seen)
                else:
                    self._end(job, FinishReason.CANCELLED)
                    self._metrics.observe_cancel_release("client", self.clock() - seen)
        for job, tokens in mail.reads:
            self._backpressure.read(job, tokens)
        for question in mail.questions:
            question()
        return mail.stop

    def _give_way(self) -> None:
        """Ends the server's own requests: a client's has arrived."""
        for job in [job for job in self._jobs.values() if job.internal]:
            self._end(job, FinishReason.CANCELLED, GaveWayError("a client's request has arrived"))

    def _seconds_to_wait(self) -> float | None:
        """Not at all while there is work; while all that live are paused, until one has run out of time."""
        if self._scheduler.has_work:
            return 0.0
        if (moment := self._backpressure.next_expiry) is None:
            return None
        if self._deadlines:
            moment = min(moment, self._deadlines[0][0])
        return max(0.0, moment - self.clock())

    def _expire_deadlines(self) -> None:
        now = self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            if (job := self._jobs.get(request_id)) is None:  # it has ended
                continue
            if job.deadline == deadline:  # else the id is in use again
                self._end_late(job, deadline)
            elif job.queue_deadline == deadline and job.first_scheduled is None:
                text = f"request {request_id}: its turn did not come within its queue_timeout"
                self._end(job, FinishReason.QUEUE_TIMEOUT, QueueTimeoutError(text, self.inbox.predicted_wait))

    def _end_late(self, job: Job, since: float) -> None:
        error = DeadlineExceededError(f"request {job.request.request_id}: the deadline passed")
        self._end(job, FinishReason.DEADLINE, error)
        self._metrics.observe_cancel_release("deadline", self.clock() - since)

    def _expire_slow_readers(self) -> None:
        for job in self._backpressure.expired():
            expired = self.clock()
            text = f"request {job.request.request_id}: {job.unread} tokens wait and nobody reads them"
            self._end(job, FinishReason.SLOW_READER, SlowReaderError(text))
            self._metrics.observe_cancel_release("slow_reader", self.clock() - expired)

    def _step(self) -> None:
        started = self.clock()
        plan = self._scheduler.plan(self._costs.prompt_limit())
        for job in (self._jobs[chunk.request_id] for chunk in plan.chunks):
            if job.first_scheduled is None:
                job.first_scheduled = started
        self._tell()  # not before: the event loop would wake up only to wait for the interpreter until the network runs
        if not plan.chunks:
            return
        result = self._execution.run(self._observer.ask(plan, self._jobs))
        now = self.clock()
        advances = self._scheduler.commit(plan, result)
        self._costs.committed(plan, result, advances, self._jobs, started, now)
        self._observer.take(plan, result, advances, self._jobs)
        self._advance(advances, now)
        num_accepted = sum(max(len(advance.sampled) - 1, 0) for advance in advances)
        self._metrics.observe_step(plan, now - started, num_accepted)

    def _fail(self, request_id: str, cause: Exception) -> None:
        if isinstance(cause, NonFiniteLogitsError):
            self._observer.non_finite(request_id)
        error = EngineFaultError(f"request {request_id} failed inside the engine")
        self._end(self._jobs[request_id], FinishReason.ERROR, error)

    def _advance(self, advances: Sequence[Advance], now: float) -> None:
        """Turns what a step did into events."""
        contexts: list[int] = []
        gaps: list[float] = []
        for advance in advances:
            request = advance.request
            job = self._jobs[request.request_id]
            if not advance.sampled:
                if (progress := job.progress(now)) is not None:
                    self._publication.append((job, progress))
                continue
            if request.given:
                self._publication += [(job, Delta("", advance.sampled, job.index)), (job, job.finished())]
                self._release(job, FinishReason.SCORED)
                continue
            is_first = job.first_token is None
            delta = job.take_tokens(advance.sampled, now)
            self._publication.append((job, delta))
            if is_first:
                self._metrics.observe_first_token(request.num_prompt_tokens, job.timings())
            else:
                count = len(delta.tokens)
                contexts += range(request.num_tokens - count + 1, request.num_tokens + 1)
                gaps += job.gaps[-count:]
            if job.is_finished:
                finished = job.finished()
                self._publication.append((job, finished))
                self._release(job, finished.reason)
            else:
                self._backpressure.published(job, len(delta.tokens))
        self._metrics.observe_gaps(contexts, gaps)

    def _end(self, job: Job, reason: FinishReason, error: RequestError | None = None) -> None:
        """A call ends without all its answers, unless it has done so before; a client that left is told nothing."""
        if job.request.is_finished:
            return
        if error is not None:
            self._publication.append((job, job.failed(error)))
        for answer in (job, *job.others):
            if not answer.request.is_finished:
                self._release(answer, reason)

    def _release(self, job: Job, reason: FinishReason) -> None:
        self._scheduler.finish(job.request, reason)
        self._backpressure.forget(job)
        del self._jobs[job.request.request_id]
        self.inbox.forget(job.request.request_id)
        if not job.internal:
            self._metrics.observe_finished(reason, job.request, job.timings(), self.clock() - job.received)

    def _tell(self) -> None:
        """Tells clients what has happened to them."""
        if self._publication:
            self._publish(self._publication)
            self._publication = []

    def _report(self) -> None:
        """Tells the queue and the metrics how things stand, and clients unless the next step is about to."""
        if not self._scheduler.has_work:
            self._tell()
        self.inbox.settle(self._scheduler.waiting.tenants, *self._costs.backlog())
        report(self._metrics, self._scheduler, self._pool, self._jobs, self._execution.fruitless_steps)

    def _shut_down(self, told: float) -> None:
        """Ends what is left."""
        for job in self._refuse_and_collect(DrainingError("the server is shutting down", 1.0)):
            self._end(job, FinishReason.SHUTDOWN, DrainingError("the server is shutting down", 1.0))
            self._metrics.observe_cancel_release("shutdown", self.clock() - told)
        self._report()

    def _fail_all(self) -> None:
        """Fails what is left after a fault, without trusting the scheduler: the pool ends with the thread."""
        fault = "the engine has stopped after an internal fault"
        for job in self._refuse_and_collect(EngineFaultError(fault)):
            self._publication.append((job, job.failed(EngineFaultError(fault))))
            self._metrics.observe_finished(FinishReason.ERROR, job.request, job.timings(), self.clock() - job.received)
        self._jobs.clear()
        self._tell()

    def _refuse_and_collect(self, refusal: RequestError) -> list[Job]:
        """All that have not ended, late arrivals too; none comes after them."""
        self.inbox.refuse(refusal)
        mail = self.inbox.take(0.0)
        for question in mail.questions:
            question()
        self._jobs |= {job.request.request_id: job for job in mail.arrivals}
        return list(self._jobs.values())
