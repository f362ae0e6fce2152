"""Which requests met their objectives, and that no first token is missed however often requests are preempted."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest

from pagestream.server.events import Timings, nearest_rank
from pagestream.server.metrics import Metrics
from pagestream.server.objectives import Objectives
from pagestream.server.request import FinishReason
from pagestream.v1 import generation_pb2 as pb
from tests.server.test_metrics import make_request
from tests.support.service import Service, stop
from tests.support.waiting import WAIT

OBJECTIVES = Objectives(first_token=1.0, gap=0.1, end=10.0)


def timings(first: float | None, *gaps: float) -> Timings:
    return Timings(queue=None, prefill=None, decode=None, time_to_first_token=first, gaps=gaps)


@pytest.mark.parametrize(
    ("reason", "times", "seconds", "judged"),
    [
        (FinishReason.MAX_TOKENS, timings(1.0, 0.1, 0.05), 10.0, {"ttft": True, "itl": True, "e2e": True}),
        (FinishReason.STOP_STRING, timings(1.1, 0.1, 0.2), 10.1, {"ttft": False, "itl": False, "e2e": False}),
        (FinishReason.END_OF_SEQUENCE, timings(0.5), 1.0, {"ttft": True, "e2e": True}),
        (FinishReason.MAX_TOKENS, timings(0.1, *[0.01] * 300, 0.5), 5.0, {"ttft": True, "itl": True, "e2e": True}),
        (FinishReason.DEADLINE, timings(0.5, 0.01), 2.0, {"ttft": True, "itl": True, "e2e": False}),
        (FinishReason.QUEUE_TIMEOUT, timings(None), 2.0, {"ttft": False, "e2e": False}),
        (FinishReason.CANCELLED, timings(5.0), 20.0, {}),
        (FinishReason.SCORED, timings(None), 20.0, {}),
    ],
)
def test_what_is_met(reason: FinishReason, times: Timings, seconds: float, judged: dict[str, bool]) -> None:
    assert dict(OBJECTIVES.judge(reason, times, seconds)) == judged


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(1, 0.5, 1), (2, 0.5, 1), (5, 0.5, 3), (1, 0.99, 1), (99, 0.99, 99), (100, 0.99, 99), (101, 0.99, 100)],
)
def test_quantiles_are_of_the_nearest_rank(count: int, share: float, expected: int) -> None:
    """Worked out by hand: of 1, 2, 3 ... the smallest that this share does not exceed."""
    assert nearest_rank(range(1, count + 1), share) == expected


def test_requests_are_counted_by_their_prompt() -> None:
    metrics = Metrics(objectives=OBJECTIVES)
    for length, first in ((100, 0.5), (5000, 3.0)):
        metrics.observe_finished(FinishReason.MAX_TOKENS, make_request(length), timings(first), 4.0)
    counts = {labels: n for labels, n in metrics.read().values["slo_requests_total"].items() if n}
    assert counts == {
        ("256", "ttft", "true"): 1,
        ("256", "e2e", "true"): 1,
        ("8192", "ttft", "false"): 1,
        ("8192", "e2e", "true"): 1,
    }


def test_every_first_token_is_counted_once_in_a_pool_that_is_always_full(make_service: Callable[..., Service]) -> None:
    """500 requests at once, which preempt each other; some end before their first token."""
    service = make_service(num_blocks=24, max_running=16, token_budget=64)
    calls = []
    for number in range(500):
        timeout = {"nanos": 1_000_000} if number % 10 == 0 else None
        request = pb.GenerateRequest(text=f"{number} " * 10, stop=stop(60 + number % 40), queue_timeout=timeout)
        calls.append(service.client.generation.Generate.future(request, timeout=WAIT))
    codes = [call.code() for call in calls]
    answered = codes.count(grpc.StatusCode.OK)
    assert answered >= 400
    assert answered + codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 500
    reading = service.metrics.read()
    assert reading.values["preemptions_total"]["out_of_blocks",] > 0
    for family in ("time_to_first_token_seconds", "queue_time_seconds", "prefill_time_seconds"):
        assert reading.histograms[family].counts[:, -1].sum() == answered, family
    met = reading.values["slo_requests_total"]
    assert sum(n for (_, objective, _), n in met.items() if objective == "ttft") == 500 - _refused(service)


def _refused(service: Service) -> float:
    """Before they were taken on."""
    return service.metrics.read().values["requests_rejected_total"]["queue_full",]
