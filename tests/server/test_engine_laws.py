"""One end for each call, whatever happens in whatever order: the engine's turns, driven by a state machine.

The engine runs without its thread, on a clock that the machine moves: answers end, clients leave, deadlines pass,
readers stop and come back, steps fail, the server drains and stops, at any moment between two steps.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from pagestream.model.sampling import NonFiniteLogitsError
from pagestream.model.step import StepPlan, StepResult
from pagestream.server.backpressure import ReaderLimits
from pagestream.server.block_pool import BlockPool
from pagestream.server.engine import Engine
from pagestream.server.errors import DrainingError, DuplicateRequestError, QueueFullError
from pagestream.server.events import Delta, Failed, Finished
from pagestream.server.inbox import QueueLimits
from pagestream.server.job import Job, Publication
from pagestream.server.metrics import Metrics
from pagestream.server.observer import Observer
from pagestream.server.pace import Pace
from pagestream.server.prompt_lookup import MAX_PROPOSED
from pagestream.server.request import FinishReason, Priority
from pagestream.server.scheduler import Scheduler
from tests.support.fakes import EchoRunner, FakeClock, make_answers, make_scored

UNREAD, PATIENCE, QUEUE = 3, 30.0, 12
ANSWERED = (
    FinishReason.END_OF_SEQUENCE,
    FinishReason.STOP_STRING,
    FinishReason.STOP_TOKEN,
    FinishReason.MAX_TOKENS,
    FinishReason.MAX_CONTEXT,
    FinishReason.SCORED,
)


class Flaky:
    """Says the prompt over and over; some requests fail, and what is told to happen during a step does."""

    def __init__(self) -> None:
        self.bad: set[str] = set()
        self.during: Callable[[], None] = lambda: None

    def step(self, plan: StepPlan) -> StepResult:
        happen, self.during = self.during, lambda: None
        happen()
        for chunk in plan.chunks:
            if chunk.request_id in self.bad:
                raise NonFiniteLogitsError(chunk.request_id)
        return StepResult(tuple(map(EchoRunner._answer, plan.chunks)))


class EngineMachine(RuleBasedStateMachine):
    turns: ClassVar[int] = 0  # of all
    ends: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.runner, self.metrics = FakeClock(), Flaky(), Metrics()
        self.pool = BlockPool(10, 4)
        self.scheduler = Scheduler(self.pool, token_budget=12, max_running=4, speculation=True)
        self.engine = Engine(
            self.pool,
            self.scheduler,
            self.runner,
            self.metrics,
            QueueLimits(QUEUE, 200),
            ReaderLimits(UNREAD, PATIENCE),
            Pace(1.0),
            Observer(self.metrics, 0, self.clock),
            self.publish,
            lambda: pytest.fail("the engine is gone"),
            self.clock,
        )
        self.jobs: list[Job] = []
        self.unread: Counter[Job] = Counter()
        self.terminal: Counter[Job] = Counter()
        self.failed: Counter[Job] = Counter()
        self.left: set[Job] = set()  # cancelled by their clients
        self.drained = False

    def publish(self, publication: Publication) -> None:
        for job, event in publication:
            assert not self.terminal[job], "nothing comes after the end"
            assert not any(self.failed[other] for other in job.others), "nor after that of the call"
            if isinstance(event, Delta) and not job.request.given:
                self.unread[job] += len(event.tokens)
                assert self.unread[job] <= UNREAD + MAX_PROPOSED
            self.terminal[job] += isinstance(event, Finished | Failed)
            self.failed[job] += isinstance(event, Failed)

    @rule(
        prompt=st.integers(1, 25),
        answer=st.integers(1, 12),
        deadline=st.none() | st.integers(0, 60),
        patience=st.none() | st.integers(1, 40),
        stops=st.booleans(),
        tenant=st.sampled_from("ab"),
        priority=st.sampled_from(Priority),
        bad=st.integers(0, 9),
        answers=st.integers(1, 3),
    )
    def submit(
        self,
        prompt: int,
        answer: int,
        deadline: int | None,
        patience: int | None,
        stops: bool,
        tenant: str,
        priority: Priority,
        bad: int,
        answers: int,
    ) -> None:
        now = self.clock()
        jobs = make_answers(
            str(len(self.jobs)),
            answers,
            prompt="xyz"[prompt % 3] * prompt,
            max_new_tokens=answer,
            received=now,
            deadline=None if deadline is None else now + deadline,
            queue_deadline=None if patience is None else now + patience,
            stop_strings=("yyyy",) if stops else (),
        )
        for job in jobs:
            job.request.tenant, job.request.priority = tenant, priority
        try:
            self.engine.inbox.submit(*jobs)
        except DrainingError:
            assert self.drained
        except QueueFullError:
            assert self.engine.inbox.num_waiting >= 1
        else:
            assert not self.drained
            self.jobs += jobs
            if not bad:
                self.runner.bad.add(jobs[-1].request.request_id)
            with pytest.raises((DuplicateRequestError, QueueFullError)):
                self.engine.inbox.submit(*jobs)

    @rule(prompt=st.integers(1, 20), answer=st.integers(1, 6), internal=st.booleans(), bad=st.integers(0, 9))
    def score(self, prompt: int, answer: int, internal: bool, bad: int) -> None:
        job = make_scored(
            str(len(self.jobs)), "xyz"[prompt % 3] * prompt, "y" * answer, self.clock(), internal=internal
        )
        try:
            self.engine.inbox.submit(job)
        except (DrainingError, QueueFullError):
            return
        self.jobs.append(job)
        if not bad:
            self.runner.bad.add(job.request.request_id)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._cancel(data.draw(st.sampled_from(self.jobs[-12:])))

    def _cancel(self, job: Job) -> None:
        """Its client may have left before, and it may have ended long ago."""
        self.left.update((job, *job.others))
        self.engine.inbox.cancel(job, *job.others)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), most=st.integers(1, UNREAD))
    def read(self, data: st.DataObject, most: int) -> None:
        self._read(data.draw(st.sampled_from(self.jobs[-12:])), most)

    def _read(self, job: Job, most: int) -> None:
        tokens = min(most, self.unread[job])
        self.unread[job] -= tokens
        self.engine.inbox.acknowledge(job, tokens)

    @rule(seconds=st.integers(1, 40))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def turn(self) -> None:
        if self.scheduler.has_work or self.engine.inbox._has_mail():  # else its thread would sleep
            assert self.engine._turn() is None
            EngineMachine.turns += 1
            self.scheduler.check_integrity()
            assert self.metrics.snapshot.leaked_blocks == 0

    @rule(seed=st.integers(0, 2**32), turns=st.integers(1, 400), reading=st.floats(0, 1), leaving=st.floats(0, 0.3))
    def storm(self, seed: int, turns: int, reading: float, leaving: float) -> None:
        chance = random.Random(seed)

        def happen() -> None:  # also while a step runs
            recent = self.jobs[-12:]
            for job in recent:
                if chance.random() < reading:
                    self._read(job, UNREAD)
            if recent and chance.random() < leaving:
                self._cancel(chance.choice(recent))

        for _ in range(turns):
            self.clock.now += chance.choice((0, 1, 3))
            if chance.random() < 0.4 and not self.drained:
                deadline, patience = chance.choice((None, 5, 40)), chance.choice((None, 3, 20))
                prompt, answer = chance.randint(1, 25), chance.randint(1, 12)
                stops, bad = chance.random() < 0.3, chance.randint(0, 15)
                priority = chance.choice(tuple(Priority))
                answers = chance.choice((1, 1, 2, 3))
                self.submit(prompt, answer, deadline, patience, stops, chance.choice("ab"), priority, bad, answers)
            if chance.random() < 0.1:
                self.score(chance.randint(1, 20), chance.randint(1, 6), chance.random() < 0.5, chance.randint(0, 15))
            happen()
            self.runner.during = happen
            self.turn()

    @rule()
    def drain(self) -> None:
        self.engine.drain(5.0)
        self.drained = True

    def teardown(self) -> None:
        self.engine.inbox.stop()
        stop = self.engine._turn()
        assert stop is not None
        self.engine._shut_down(stop)
        assert self.pool.num_active == 0
        for job in self.jobs:
            reason = job.finish_reason
            assert reason is not None
            gave_way = job.internal and reason is FinishReason.CANCELLED and self.failed[job]
            if reason in ANSWERED or (reason is FinishReason.CANCELLED and not gave_way):
                assert self.terminal[job] == (reason in ANSWERED)
            else:
                assert sum(self.failed[one] for one in (job, *job.others)) == 1
            assert reason is not FinishReason.CANCELLED or job in self.left or gave_way
            EngineMachine.ends["gave way" if gave_way else reason.value] += 1
        counts = self.metrics.read().values["requests_finished_total"]
        assert sum(counts.values()) == sum(not job.internal for job in self.jobs), "each end is counted once"


@pytest.mark.slow
def test_every_request_ends_once_whatever_happens() -> None:
    EngineMachine.turns = 0
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{EngineMachine.turns} turns, {dict(EngineMachine.ends)}")  # noqa: T201
    expected = (
        "max_tokens",
        "stop_string",
        "cancelled",
        "deadline",
        "queue_timeout",
        "slow_reader",
        "error",
        "shutdown",
        "scored",
        "gave way",
    )
    assert all(EngineMachine.ends[reason] >= 5 for reason in expected)
