"""Several answers to one prompt: the prompt is read once, its pages are shared, and the call has one end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from pagestream.model.sampling import NonFiniteLogitsError
from pagestream.server.errors import QueueTimeoutError
from pagestream.server.events import Failed, Finished
from pagestream.server.metrics import Metrics
from pagestream.server.request import Request
from pagestream.server.scheduler import Scheduler
from pagestream.v1 import generation_pb2 as pb
from tests.support.client import refused
from tests.support.fakes import FakeClock, Rig, make_answers
from tests.support.service import Service, stop
from tests.support.stepping import make_request, make_scheduler, step
from tests.support.waiting import wait_until


def admit_answers(scheduler: Scheduler, count: int, num_prompt_tokens: int) -> list[Request]:
    first = make_request("0", num_prompt_tokens)
    requests = [first, *(replace(first, request_id=str(index), starts_after=first) for index in range(1, count))]
    for request in requests:
        scheduler.admit(request)
    return requests


def end_reasons(service: Service) -> dict[str, float]:
    counts = service.metrics.read().values["requests_finished_total"]
    return {reason: count for (reason,), count in counts.items() if count}


def test_the_prompt_is_computed_once_and_its_pages_are_shared() -> None:
    pool, scheduler = make_scheduler(token_budget=8)  # pages of 4 tokens
    requests = admit_answers(scheduler, 4, num_prompt_tokens=10)
    assert step(scheduler) == [("0", 0, 8)]
    assert step(scheduler) == [("0", 8, 2)]
    assert step(scheduler) == [("0", 10, 1), ("1", 9, 1), ("2", 9, 1), ("3", 9, 1)]
    assert len({tuple(request.block_ids[:2]) for request in requests}) == 1
    assert len({request.block_ids[2] for request in requests}) == 4, "what differs is written to pages of their own"
    assert pool.num_active == 2 + 4
    assert scheduler.hit_tokens_total == 3 * 9
    while scheduler.has_work:
        step(scheduler)
    assert pool.num_active == 0


def test_without_a_prefix_cache_each_reads_the_prompt() -> None:
    pool, scheduler = make_scheduler(prefix_cache=False)
    admit_answers(scheduler, 2, num_prompt_tokens=10)
    assert [step(scheduler) for _ in range(2)] == [[("0", 0, 10)], [("0", 10, 1), ("1", 0, 10)]]
    assert pool.num_active == 2 * 3


def test_others_start_before_them_while_the_prompt_is_read() -> None:
    _, scheduler = make_scheduler(token_budget=8)
    admit_answers(scheduler, 3, num_prompt_tokens=30)
    scheduler.admit(make_request("short", 2))
    assert step(scheduler) == [("0", 0, 6), ("short", 0, 2)]


def test_the_stream_has_every_answer_and_counts_the_prompt_once(service: Service) -> None:
    call = service.client.open(text="abc", n=3, request_id="r", stop=stop(5))
    events = list(call)
    assert [event.WhichOneof("event") for event in (events[0], events[-1])] == ["accepted", "finished"]
    texts: Counter[int] = Counter()
    ended: dict[int, pb.Finished] = {}
    for event in events[1:]:
        assert event.delta.index not in ended or event.HasField("finished"), "nothing of an answer after its end"
        texts[event.delta.index] += len(event.delta.text)
        if event.HasField("finished"):
            assert event.finished.index not in ended
            ended[event.finished.index] = event.finished
    assert texts == dict.fromkeys(range(3), 5)
    first, *others = (ended[index].usage for index in range(3))
    assert first == pb.Usage(prompt_tokens=3, output_tokens=5)
    assert others == [pb.Usage(output_tokens=5)] * 2
    wait_until(service.is_idle, "everything is free")


def test_generate_has_all_answers(service: Service) -> None:
    whole = service.client.generate(text="abc", n=3, stop=stop(5), output=pb.OutputConfig(token_ids=True))
    assert [whole.text, *(answer.text for answer in whole.others)] == ["abcab"] * 3
    assert [answer.finished.index for answer in whole.others] == [1, 2]
    assert all(list(answer.token_ids) == list(b"abcab") for answer in whole.others)


def test_a_cancel_in_the_middle_frees_all(service: Service) -> None:
    service.rig.runner.hold()
    call = service.client.open(text="abc", n=4, stop=stop(500))
    next(call)
    service.rig.runner.allow(3)
    while next(call).delta.index != 3:
        pass
    call.cancel()
    wait_until(service.rig.engine.inbox._has_mail, "the server has seen it")
    service.rig.runner.allow()
    wait_until(lambda: end_reasons(service) == {"cancelled": 4}, "all have ended")
    wait_until(service.is_idle, "everything is free")
    assert service.rig.engine.inbox.num_live == 0


def test_an_answer_that_fails_ends_the_call_once_with_what_all_have_made(service: Service) -> None:
    service.rig.runner.faults |= {name: NonFiniteLogitsError(name) for name in ("r#1", "r#2")}
    with refused("INTERNAL", "ENGINE_FAULT") as refusal:
        service.client.stream(text="abc", n=4, request_id="r", stop=stop(500))
    assert refusal.got.usage == pb.Usage(prompt_tokens=3, output_tokens=1)  # the first's; the second step failed
    wait_until(service.is_idle, "everything is free")
    assert end_reasons(service) == {"error": 4}
    assert service.client.stream(text="abc", request_id="r", stop=stop(3)).text == "abc"


def test_a_deadline_ends_the_call_once(service: Service) -> None:
    service.rig.runner.hold()
    with refused("DEADLINE_EXCEEDED", None):
        service.client.stream(timeout=1, text="abc", n=3)
    wait_until(service.rig.engine.inbox._has_mail, "the server has seen it")
    service.rig.runner.allow()
    wait_until(lambda: sum(end_reasons(service).values()) == 3, "all have ended")
    wait_until(service.is_idle, "everything is free")
    assert set(end_reasons(service)) <= {"cancelled", "deadline"}, "whichever the engine sees first"


@pytest.mark.parametrize("begun", [True, False])
def test_the_queue_timeout_is_that_of_the_first(make_metrics: Callable[..., Metrics], begun: bool) -> None:
    clock = FakeClock()
    rig = Rig(make_metrics(), clock=clock, token_budget=4, max_running=1)
    rig.runner.hold()
    if not begun:
        rig.submit("before", max_new_tokens=2)
    jobs = make_answers("r", 3, prompt="x" * 12, queue_deadline=clock.now + 1)
    rig.engine.inbox.submit(*jobs)
    rig.runner.wait_until_held()
    clock.now += 2
    rig.runner.allow()
    ends = [rig.recorder.end_of(job.request.request_id) for job in (jobs if begun else jobs[:1])]
    if begun:
        assert all(isinstance(end, Finished) for end in ends)
    else:
        assert isinstance(ends[0], Failed)
        assert isinstance(ends[0].error, QueueTimeoutError)
        assert all(job.request.is_finished for job in jobs)
    rig.close()
