"""The engine around a runner that needs no model: ends of requests, faults, queue limits."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pagestream.model.sampling import NonFiniteLogitsError
from pagestream.model.step import StepPlan
from pagestream.server.errors import (
    DeadlineExceededError,
    DrainingError,
    DuplicateRequestError,
    EngineFaultError,
    QueueFullError,
    QueueTimeoutError,
    Usage,
)
from pagestream.server.events import Failed, Finished, Progress
from pagestream.server.execution import MAX_FAILED_STEPS
from pagestream.server.inbox import QueueLimits
from pagestream.server.job import Job
from pagestream.server.metrics import Metrics
from pagestream.server.request import FinishReason
from tests.support.fakes import FakeClock, Rig
from tests.support.waiting import WAIT, wait_until

MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig(make_metrics: Callable[..., Metrics]) -> Iterator[MakeRig]:
    rigs: list[Rig] = []

    def make(**settings: Any) -> Rig:
        rigs.append(Rig(make_metrics(), **settings))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def finished_counts(rig: Rig) -> dict[str, float]:
    counts = rig.metrics.read().values["requests_finished_total"]
    return {reason: count for (reason,), count in counts.items() if count}


def is_idle(rig: Rig) -> bool:
    snapshot = rig.metrics.snapshot
    return not (snapshot.running_contexts or snapshot.waiting_contexts) and snapshot.active_blocks == 0


def test_an_answer_is_deltas_and_a_finish_with_what_it_cost(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.submit("r", prompt="abc", max_new_tokens=5)
    end = rig.recorder.end_of("r")
    assert isinstance(end, Finished)
    assert rig.recorder.text_of("r") == "abcab"
    assert (end.reason, end.prompt_tokens, end.output_tokens) == (FinishReason.MAX_TOKENS, 3, 5)
    timings = end.timings
    assert timings.time_to_first_token == pytest.approx((timings.queue or 0) + (timings.prefill or 0))
    assert sum(timings.gaps) == pytest.approx(timings.decode)
    wait_until(lambda: is_idle(rig), "the engine is idle")


def test_progress_of_a_long_prompt_counts_up_to_the_step_that_samples(make_rig: MakeRig) -> None:
    rig = make_rig(token_budget=16)
    rig.submit("r", prompt="x" * 50, max_new_tokens=1)
    rig.recorder.end_of("r")
    progress = [event for event in rig.recorder.events["r"] if isinstance(event, Progress)]
    assert progress == [Progress(16, 50), Progress(32, 50), Progress(48, 50)]


def test_progress_is_not_told_more_often_than_asked(make_rig: MakeRig) -> None:
    clock = FakeClock()
    rig = make_rig(token_budget=10, clock=clock)
    rig.runner.on_step = lambda _plan: setattr(clock, "now", clock.now + 1)
    rig.submit("r", prompt="x" * 95, max_new_tokens=1, progress_interval=3.0)
    rig.recorder.end_of("r")
    told = [event.computed_tokens for event in rig.recorder.events["r"] if isinstance(event, Progress)]
    assert told == [10, 40, 70]


def test_a_stop_string_ends_the_request_and_frees_its_blocks(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.submit("r", prompt="hello world ", max_new_tokens=40, stop_strings=("wor",))
    end = rig.recorder.end_of("r")
    assert isinstance(end, Finished)
    assert (rig.recorder.text_of("r"), end.reason, end.matched_stop) == ("hello ", FinishReason.STOP_STRING, "wor")
    assert end.output_tokens == len("hello wor")
    wait_until(lambda: is_idle(rig), "the engine is idle")


def test_a_cancel_frees_the_blocks_before_the_next_step(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.runner.hold()
    leaver = rig.submit("leaver", max_new_tokens=100)
    rig.submit("stayer", max_new_tokens=4)
    rig.runner.wait_until_held()
    rig.runner.allow(2)
    rig.runner.wait_until_held()
    rig.engine.inbox.cancel(leaver)  # while a step runs
    rig.runner.allow(1)
    rig.runner.wait_until_held()
    assert leaver.request.finish_reason is FinishReason.CANCELLED
    assert rig.pool.num_active == 1
    rig.scheduler.check_integrity()
    rig.runner.allow()
    assert isinstance(rig.recorder.end_of("stayer"), Finished)
    assert not any(isinstance(event, Finished | Failed) for event in rig.recorder.events["leaver"])
    release = rig.metrics.read().histograms["cancel_release_seconds"]
    assert release.counts[:, -1].tolist() == [1, 0, 0, 0]  # client, deadline, slow reader, shutdown


@pytest.mark.parametrize(("early", "reason"), [(0.01, FinishReason.DEADLINE), (1.0, FinishReason.CANCELLED)])
def test_a_client_that_hangs_up_at_its_deadline_has_not_cancelled(
    make_rig: MakeRig, early: float, reason: FinishReason
) -> None:
    """By its own clock, which may be ahead, as gRPC does in its name."""
    clock = FakeClock()
    rig = make_rig(clock=clock)
    rig.runner.hold()
    late = rig.submit("late", max_new_tokens=100, deadline=clock.now + 5)
    rig.runner.wait_until_held()
    clock.now += 5 - early
    rig.engine.inbox.cancel(late)
    rig.runner.allow()

    def released() -> list[int]:  # by the client, by a deadline
        return rig.metrics.read().histograms["cancel_release_seconds"].counts[:2, -1].tolist()

    wait_until(lambda: sum(released()) > 0, "its blocks are free")
    assert late.request.finish_reason is reason
    assert released() == [reason is not FinishReason.DEADLINE, reason is FinishReason.DEADLINE]


def test_a_deadline_frees_the_blocks_before_the_next_step(make_rig: MakeRig) -> None:
    clock = FakeClock()
    rig = make_rig(clock=clock)
    rig.runner.hold()
    late = rig.submit("late", max_new_tokens=100, deadline=clock.now + 5)
    # Unlike the other, or it may start a step later and hold the other's block for as long as it copies from it.
    rig.submit("patient", prompt="xyz", max_new_tokens=4, deadline=clock.now + 500)
    rig.runner.wait_until_held()
    clock.now += 5
    rig.runner.allow(1)
    rig.runner.wait_until_held()
    assert late.request.finish_reason is FinishReason.DEADLINE
    assert rig.pool.num_active == 1
    rig.runner.allow()
    end = rig.recorder.end_of("late")
    assert isinstance(end, Failed)
    assert isinstance(end.error, DeadlineExceededError)
    assert isinstance(rig.recorder.end_of("patient"), Finished)


def test_a_deadline_ends_a_request_that_still_waits(make_rig: MakeRig) -> None:
    clock = FakeClock()
    rig = make_rig(clock=clock, max_running=1)
    rig.runner.hold()
    rig.submit("first", max_new_tokens=3)
    rig.runner.wait_until_held()
    waiting = rig.submit("waiting", deadline=clock.now + 1)
    clock.now += 2
    rig.runner.allow()
    assert isinstance(rig.recorder.end_of("waiting"), Failed)
    assert waiting.first_scheduled is None
    assert isinstance(rig.recorder.end_of("first"), Finished)


def test_a_queue_timeout_ends_only_what_no_step_has_worked_on(make_rig: MakeRig) -> None:
    clock = FakeClock()
    rig = make_rig(clock=clock, max_running=1)
    rig.runner.hold()
    rig.submit("first", max_new_tokens=3, queue_deadline=clock.now + 1)
    rig.runner.wait_until_held()
    impatient = rig.submit("impatient", queue_deadline=clock.now + 1, deadline=clock.now + 50)
    rig.submit("patient", max_new_tokens=3, queue_deadline=clock.now + 30)
    clock.now += 2
    rig.runner.allow()
    end = rig.recorder.end_of("impatient")
    assert isinstance(end, Failed)
    assert isinstance(end.error, QueueTimeoutError)
    assert 1 <= end.error.retry_after_seconds <= 60
    assert (impatient.first_scheduled, impatient.request.finish_reason) == (None, FinishReason.QUEUE_TIMEOUT)
    assert all(isinstance(rig.recorder.end_of(name), Finished) for name in ("first", "patient"))


def test_the_deadline_of_an_ended_request_does_not_touch_a_later_one_of_the_same_id(make_rig: MakeRig) -> None:
    clock = FakeClock()
    rig = make_rig(clock=clock)
    rig.submit("id", max_new_tokens=1, deadline=clock.now + 5)
    assert isinstance(rig.recorder.end_of("id"), Finished)
    rig.recorder.events.clear()
    rig.runner.hold()
    rig.submit("id", max_new_tokens=3, deadline=clock.now + 100)
    rig.runner.wait_until_held()
    clock.now += 10
    rig.runner.allow()
    assert isinstance(rig.recorder.end_of("id"), Finished)


def test_a_fault_ends_the_request_at_fault_alone(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.runner.faults["bad"] = RuntimeError("secret internals")
    rig.runner.hold()
    for request_id, prompt in (("one", "abc"), ("bad", "def"), ("two", "ghi")):
        rig.submit(request_id, prompt=prompt, max_new_tokens=5)
    rig.runner.allow()
    ends = {request_id: rig.recorder.end_of(request_id) for request_id in ("one", "bad", "two")}
    assert (rig.recorder.text_of("one"), rig.recorder.text_of("two")) == ("abcab", "ghigh")
    assert isinstance(ends["bad"], Failed)
    assert isinstance(ends["bad"].error, EngineFaultError)
    assert "bad" in str(ends["bad"].error)
    assert "secret" not in str(ends["bad"].error)
    wait_until(lambda: is_idle(rig), "the engine is idle")
    assert finished_counts(rig) == {"max_tokens": 2, "error": 1}
    assert not rig.gone.is_set()


def test_requests_without_a_usable_distribution_do_not_end_the_engine(make_rig: MakeRig) -> None:
    """They fail by their own settings or prompt, however many come; the device works."""
    rig = make_rig()
    for number in range(2 * MAX_FAILED_STEPS):
        request_id = f"bad {number}"
        rig.runner.faults[request_id] = NonFiniteLogitsError(request_id)
        rig.submit(request_id)
        assert isinstance(rig.recorder.end_of(request_id), Failed)
    wait_until(lambda: rig.metrics.snapshot.fruitless_steps == 2 * MAX_FAILED_STEPS, "the watchdog can tell")
    rig.submit("good")
    assert isinstance(rig.recorder.end_of("good"), Finished)
    wait_until(lambda: rig.metrics.snapshot.fruitless_steps == 0, "it works again")
    assert not rig.gone.is_set()


def test_an_engine_whose_steps_all_fail_is_gone_and_says_so(make_rig: MakeRig) -> None:
    rig = make_rig(max_running=1)
    broken = RuntimeError("device lost")
    names = [f"r{number}" for number in range(MAX_FAILED_STEPS + 2)]
    rig.runner.faults.update(dict.fromkeys(names, broken))
    rig.runner.hold()
    for name in names:
        rig.submit(name)
    rig.runner.allow()
    assert rig.gone.wait(WAIT)
    for name in names:
        end = rig.recorder.end_of(name)
        assert isinstance(end, Failed)
        assert isinstance(end.error, EngineFaultError)
    with pytest.raises(EngineFaultError):
        rig.submit("newcomer")
    assert finished_counts(rig) == {"error": len(names)}


def test_faults_with_successes_between_them_do_not_add_up(make_rig: MakeRig) -> None:
    rig = make_rig()
    for number in range(2 * MAX_FAILED_STEPS):
        rig.runner.faults[f"bad {number}"] = RuntimeError("once")
        for name in (f"bad {number}", f"good {number}"):
            rig.submit(name)
            rig.recorder.end_of(name)
    assert not rig.gone.is_set()


def test_draining_refuses_newcomers_and_finishes_the_rest(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.runner.hold()
    rig.submit("old", max_new_tokens=4)
    rig.engine.drain(retry_after_seconds=7.0)
    with pytest.raises(DrainingError) as refusal:
        rig.submit("new")
    assert refusal.value.retry_after_seconds == 7.0
    rig.runner.allow()
    assert isinstance(rig.recorder.end_of("old"), Finished)


def test_stop_ends_what_runs_and_what_waits(make_rig: MakeRig) -> None:
    rig = make_rig(max_running=1)
    rig.runner.hold()
    rig.submit("runs", max_new_tokens=1000)
    rig.runner.wait_until_held()
    rig.submit("waits")
    stopping = threading.Thread(target=rig.engine.stop)
    stopping.start()
    rig.runner.allow()
    stopping.join(WAIT)
    assert not stopping.is_alive()
    for name in ("runs", "waits"):
        end = rig.recorder.end_of(name)
        assert isinstance(end, Failed)
        assert isinstance(end.error, DrainingError)
        assert end.error.usage == Usage(3, len(rig.recorder.text_of(name)), preemptions=0)
    with pytest.raises(DrainingError):
        rig.submit("late")
    assert is_idle(rig)
    assert rig.pool.num_active == 0
    release = rig.metrics.read().histograms["cancel_release_seconds"]
    assert release.counts[:, -1].tolist() == [0, 0, 0, 2]  # client, deadline, slow reader, shutdown


def test_the_queue_is_full_by_requests(make_rig: MakeRig) -> None:
    rig = make_rig(limits=QueueLimits(max_requests=2, max_tokens=1_000_000), max_running=1)
    rig.runner.hold()
    rig.submit("runs", max_new_tokens=2)
    rig.runner.wait_until_held()
    wait_until(lambda: rig.engine.inbox.num_waiting <= 1, "what runs has left the queue")
    ahead = rig.engine.inbox.num_waiting
    for number in range(2 - ahead):
        rig.submit(f"waits {number}")
    with pytest.raises(QueueFullError) as refusal:
        rig.submit("too many")
    assert refusal.value.retry_after_seconds >= 1
    rig.runner.allow()
    rig.recorder.end_of("waits 0")
    wait_until(lambda: rig.engine.inbox.num_waiting == 0, "the queue is empty")
    rig.submit("too many")
    assert isinstance(rig.recorder.end_of("too many"), Finished)


def test_the_queue_is_full_by_tokens_but_takes_any_prompt_when_empty(make_rig: MakeRig) -> None:
    rig = make_rig(limits=QueueLimits(max_requests=100, max_tokens=20), max_running=1)
    rig.runner.hold()
    rig.submit("long", prompt="x" * 200, max_new_tokens=1)
    with pytest.raises(QueueFullError):
        rig.submit("short", prompt="y")
    rig.runner.allow()
    assert isinstance(rig.recorder.end_of("long"), Finished)


def test_an_id_can_be_used_again_once_its_request_has_ended(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.runner.hold()
    rig.submit("id", max_new_tokens=2)
    with pytest.raises(DuplicateRequestError):
        rig.submit("id")
    rig.runner.allow()
    rig.recorder.end_of("id")
    rig.recorder.events.clear()
    rig.submit("id", max_new_tokens=2)
    assert isinstance(rig.recorder.end_of("id"), Finished)


def test_a_preempted_answer_is_the_same_and_reports_it(make_rig: MakeRig) -> None:
    rig = make_rig(num_blocks=24, block_size=1, token_budget=16)
    rig.runner.hold()
    for name, prompt in (("a", "abc"), ("b", "defgh"), ("c", "ij")):
        rig.submit(name, prompt=prompt, max_new_tokens=16)
    rig.runner.allow()
    ends = [rig.recorder.end_of(name) for name in "abc"]
    assert [rig.recorder.text_of(name) for name in "abc"] == ["abcabcabcabcabca", "defghdefghdefghd", "ij" * 8]
    preemptions = [end.preemptions for end in ends if isinstance(end, Finished)]
    assert sum(preemptions) > 0
    values = rig.metrics.read().values
    assert values["preemptions_total"]["out_of_blocks",] == sum(preemptions)
    assert values["recomputed_tokens_total"][()] > 0


def test_after_many_random_ends_the_pool_is_free_and_every_request_ended_once(make_rig: MakeRig) -> None:
    """1,500 requests from three threads that finish, are cancelled, run out of time or fail, with preemptions."""
    clock, limits = FakeClock(), QueueLimits(10_000, 10_000_000)
    rig = make_rig(num_blocks=96, block_size=1, token_budget=16, max_running=6, clock=clock, limits=limits)
    problems: list[Exception] = []

    def on_step(_plan: StepPlan) -> None:  # on the engine's thread, so nothing moves meanwhile
        clock.now += 1
        try:
            rig.scheduler.check_integrity()
        except RuntimeError as error:
            problems.append(error)

    rig.runner.on_step = on_step
    with ThreadPoolExecutor() as threads:
        everything = [job for jobs in threads.map(lambda seed: submit_at_random(rig, seed), range(3)) for job in jobs]
    wait_until(lambda: all(job.request.is_finished for job in everything) and is_idle(rig), "all requests ended", 150)
    for job in everything:
        rig.engine.inbox.cancel(job)  # as the service does after every request: nothing may come of it
    rig.submit("last")
    rig.recorder.end_of("last")

    assert problems == []
    assert len(everything) == 1500
    assert rig.pool.num_active == 0
    rig.scheduler.check_integrity()
    reasons = Counter(job.request.finish_reason.value for job in everything if job.request.finish_reason)
    assert all(reasons[name] >= 10 for name in ("max_tokens", "cancelled", "deadline", "error")), reasons
    assert rig.scheduler.num_preemptions_total > 0
    assert finished_counts(rig) == reasons + Counter({"max_tokens": 1})
    for job in everything:
        events = rig.recorder.events[job.request.request_id]
        ends = [event for event in events if isinstance(event, Finished | Failed)]
        assert len(ends) == (job.request.finish_reason is not FinishReason.CANCELLED)
        assert not ends or events[-1] is ends[0]


def submit_at_random(rig: Rig, seed: int) -> list[Job]:
    rng = random.Random(seed)
    jobs: list[Job] = []
    for number in range(500):
        request_id = f"{seed}/{number}"
        if rng.random() < 0.06:
            rig.runner.faults[request_id] = NonFiniteLogitsError(request_id)
        deadline = rig.engine.clock() + rng.randint(0, 4000) if rng.random() < 0.4 else None
        prompt, answer = f"{number}/{seed}".ljust(rng.randint(1, 30), "x"), rng.randint(1, 25)
        jobs.append(rig.submit(request_id, prompt=prompt, max_new_tokens=answer, deadline=deadline))
        if rng.random() < 0.4:
            rig.engine.inbox.cancel(rng.choice(jobs))  # ended, running, waiting or cancelled before
    return jobs
