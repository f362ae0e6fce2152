"""Readers that fall behind: their streams leave the batch, come back or end, and cost nobody else anything."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pagestream.model.step import StepPlan
from pagestream.server.backpressure import ReaderLimits
from pagestream.server.errors import DeadlineExceededError, SlowReaderError
from pagestream.server.events import Delta, Failed, Finished
from pagestream.server.job import Job, Publication
from pagestream.server.metrics import Metrics
from pagestream.server.request import FinishReason, RequestState
from pagestream.v1 import generation_pb2 as pb
from tests.support.client import Client, gather, refused
from tests.support.fakes import LONG, FakeClock, Rig
from tests.support.service import Service, stop
from tests.support.waiting import wait_until

MakeRig = Callable[..., Rig]
LIMIT, PATIENCE = 4, 10.0  # unread tokens, seconds


@pytest.fixture
def make_rig(make_metrics: Callable[..., Metrics]) -> Iterator[MakeRig]:
    rigs: list[Rig] = []

    def make(**settings: Any) -> Rig:
        rigs.append(Rig(make_metrics(), readers=ReaderLimits(LIMIT, PATIENCE), **settings))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def value(metrics: Metrics, name: str) -> float:
    return metrics.read().values[name][()]


def wait_for_pause(rig: Rig) -> None:
    wait_until(lambda: value(rig.metrics, "streams_paused") == 1, "the stream is paused")


def test_a_stream_pauses_at_the_limit_and_resumes_at_half_of_it(make_rig: MakeRig) -> None:
    clock = FakeClock()
    rig = make_rig(clock=clock)
    job = rig.submit("r", prompt="abcdefg", max_new_tokens=7)
    wait_for_pause(rig)
    assert (rig.recorder.text_of("r"), job.request.state) == ("abcd", RequestState.PAUSED)
    assert (rig.pool.num_active, rig.pool.num_cached) == (0, 1)  # kept until somebody needs it
    clock.now += 3
    rig.engine.inbox.acknowledge(job, 1)
    wait_until(lambda: job.unread == 3, "the engine has heard of it")
    assert job.request.state is RequestState.PAUSED
    rig.engine.inbox.acknowledge(job, 1)
    wait_for_pause(rig)
    wait_until(lambda: rig.recorder.text_of("r") == "abcdef", "two more tokens")
    rig.engine.inbox.acknowledge(job, 4)
    end = rig.recorder.end_of("r")
    assert isinstance(end, Finished)
    assert (rig.recorder.text_of("r"), end.preemptions) == ("abcdefg", 0)
    assert value(rig.metrics, "stream_backpressure_seconds_total") == 3
    assert max(end.timings.gaps) == 0  # the pause is the reader's, not a gap between tokens


def test_a_reader_that_stays_away_ends_its_request(make_rig: MakeRig) -> None:
    clock = FakeClock()
    rig = make_rig(clock=clock)
    job = rig.submit("r", max_new_tokens=100)
    wait_for_pause(rig)
    clock.now += PATIENCE
    rig.submit("another", max_new_tokens=1)  # wakes the engine, whose real clock has not moved
    end = rig.recorder.end_of("r")
    assert isinstance(end, Failed)
    assert isinstance(end.error, SlowReaderError)
    assert job.request.finish_reason is FinishReason.SLOW_READER
    rig.recorder.end_of("another")
    wait_until(lambda: rig.pool.num_active == 0, "its blocks are free")
    assert value(rig.metrics, "stream_backpressure_seconds_total") == PATIENCE
    release = rig.metrics.read().histograms["cancel_release_seconds"]
    assert release.counts[:, -1].tolist() == [0, 0, 1, 0]  # client, deadline, slow reader, shutdown


def test_an_idle_engine_wakes_by_itself_to_end_a_pause(make_metrics: Callable[..., Metrics]) -> None:
    rig = Rig(make_metrics(), readers=ReaderLimits(LIMIT, 0.05))
    rig.submit("r", max_new_tokens=100)
    end = rig.recorder.end_of("r")
    rig.close()
    assert isinstance(end, Failed)
    assert isinstance(end.error, SlowReaderError)


def test_a_paused_request_can_be_cancelled_and_can_run_out_of_time(make_rig: MakeRig) -> None:
    clock = FakeClock()
    rig = make_rig(clock=clock)
    cancelled = rig.submit("cancelled", max_new_tokens=100)
    wait_for_pause(rig)
    late = rig.submit("late", max_new_tokens=100, deadline=clock.now + 1)
    wait_until(lambda: value(rig.metrics, "streams_paused") == 2, "both are paused")
    clock.now += 2
    rig.engine.inbox.cancel(cancelled)
    end = rig.recorder.end_of("late")
    assert isinstance(end, Failed)
    assert isinstance(end.error, DeadlineExceededError)
    wait_until(lambda: rig.metrics.snapshot.active_blocks == 0, "the blocks are free")
    assert (cancelled.request.finish_reason, late.request.finish_reason) == (
        FinishReason.CANCELLED,
        FinishReason.DEADLINE,
    )
    assert value(rig.metrics, "streams_paused") == 0
    assert value(rig.metrics, "stream_backpressure_seconds_total") == 4


def test_others_take_the_blocks_of_a_paused_request_and_its_answer_is_the_same(make_rig: MakeRig) -> None:
    rig = make_rig(num_blocks=4, block_size=4)
    job = rig.submit("paused", prompt="abcdefgh", max_new_tokens=8)
    wait_for_pause(rig)
    assert rig.pool.num_cached == 3
    rig.submit("needs all", prompt="x" * 15, max_new_tokens=1)
    assert isinstance(rig.recorder.end_of("needs all"), Finished)
    rig.engine.inbox.acknowledge(job, 4)
    wait_until(lambda: rig.recorder.text_of("paused") == "abcdefgh", "the whole answer")
    end = rig.recorder.end_of("paused")
    assert isinstance(end, Finished)
    assert end.preemptions == 0
    assert rig.scheduler.recomputed_tokens_total == 11  # all but its latest token


def test_no_reader_ever_has_more_unread_than_the_limit(make_metrics: Callable[..., Metrics]) -> None:
    """300 requests whose readers take tokens, stop, come back or leave at random, on a pool that is too small."""
    clock, chance = FakeClock(), random.Random(5)
    unread: Counter[Job] = Counter()
    seen: dict[str, list[object]] = {}
    problems: list[object] = []

    def publish(publication: Publication) -> None:  # on the engine's thread
        for job, event in publication:
            seen.setdefault(job.request.request_id, []).append(event)
            if isinstance(event, Delta):
                unread[job] += len(event.tokens)
        problems.extend(job for job, tokens in unread.items() if tokens > LIMIT)

    rig = Rig(
        make_metrics(),
        publish=publish,
        num_blocks=16,
        block_size=4,
        max_running=6,
        clock=clock,
        readers=ReaderLimits(LIMIT, 400.0),
    )
    absent: set[Job] = set()
    reading = threading.Lock()  # readers come back on two threads

    def read(job: Job, most: int) -> None:
        with reading:
            tokens = min(most, unread[job])
            unread[job] -= tokens
        rig.engine.inbox.acknowledge(job, tokens)

    def on_step(_plan: StepPlan) -> None:  # on the engine's thread as well
        clock.now += 1
        rig.scheduler.check_integrity()
        for job in [job for job, tokens in unread.items() if tokens and job not in absent]:
            read(job, chance.randint(0, LIMIT))

    rig.runner.on_step = on_step
    rig.runner.hold()
    jobs = [
        rig.submit(str(number), prompt="x" * chance.randint(1, 20), max_new_tokens=chance.randint(1, 25))
        for number in range(300)
    ]
    absent.update(chance.sample(jobs, 30))
    for job in chance.sample(jobs, 30):
        rig.engine.inbox.cancel(job)
    rig.runner.allow()

    def everybody_has_ended() -> bool:
        if not rig.scheduler.has_work:  # nothing steps, so the clock must move, and readers come back
            clock.now += 40
            for job in (job for job in jobs if job.request.state is RequestState.PAUSED):
                read(job, 0 if job in absent else LIMIT)
        return all(job.request.is_finished for job in jobs)

    wait_until(everybody_has_ended, "all have ended", 60)
    rig.close()
    assert problems == []
    assert rig.pool.num_active == 0
    reasons = Counter(job.request.finish_reason for job in jobs)
    assert reasons[FinishReason.SLOW_READER] >= 5, reasons
    assert reasons[FinishReason.MAX_TOKENS] >= 100, reasons
    assert reasons.keys() == {FinishReason.SLOW_READER, FinishReason.MAX_TOKENS, FinishReason.CANCELLED}
    for job in jobs:
        ends = [event for event in seen.get(job.request.request_id, []) if isinstance(event, Finished | Failed)]
        assert len(ends) == (job.request.finish_reason is not FinishReason.CANCELLED)


def test_fifty_readers_that_stop_reading_cost_what_may_wait_for_them_and_nothing_else(
    make_service: Callable[..., Service],
) -> None:
    """Over a real port. Each holds 10,000 bytes a token; those that read on in vain hear why they were left."""
    limit = 8
    service = make_service(num_blocks=200, max_running=64, token_budget=64, readers=ReaderLimits(limit, 1.0))
    prompt, most = pb.TokenIds(ids=[LONG]), stop(1000)
    clients = [Client(service.address) for _ in range(50)]
    silent = [client.open(token_ids=prompt, stop=most) for client in clients]
    for call in silent:
        next(call)

    def none_is_left() -> bool:
        return value(service.metrics, "streams_paused") + _ended_as_slow(service) == 50

    wait_until(none_is_left, "none of them runs")
    assert service.client.stream(text="ab", stop=stop(200)).text == "ab" * 100
    counts = service.metrics.read().values["requests_finished_total"]
    wait_until(lambda: _ended_as_slow(service) == 50, "they have ended", 60)
    assert counts["error",] == 0
    wait_until(lambda: service.metrics.snapshot.active_blocks == 0, "their blocks are free")
    waiting = [
        sum(len(d.tokens) for d in mailbox._deltas.get(0, ())) for mailbox in service.streams._mailboxes.values()
    ]
    assert len(waiting) == 50
    assert max(waiting) <= limit
    with ThreadPoolExecutor(10) as threads:
        list(threads.map(_hear_why, silent))
    wait_until(service.is_idle, "nothing is left of them")
    for client in clients:
        client.close()


def _ended_as_slow(service: Service) -> float:
    return service.metrics.read().values["requests_finished_total"]["slow_reader",]


def _hear_why(call: Any) -> None:
    with refused("RESOURCE_EXHAUSTED", "SLOW_READER"):
        gather(call)
