"""Estimate over gRPC: refusals as for a generation, fields, and forecasts beside what comes to pass."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pagestream.model.step import StepPlan
from pagestream.server.metrics import Metrics
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import insight_pb2, stats_pb2
from pagestream.v1.insight_pb2_grpc import InsightServiceStub
from tests.support.client import Client, refused
from tests.support.fakes import FakeClock, Rig
from tests.support.service import KV_CAPACITY, Service, stop
from tests.support.waiting import WAIT, wait_until


def estimate(client: Client, **fields: Any) -> insight_pb2.EstimateResponse:
    return InsightServiceStub(client.channel).Estimate(insight_pb2.EstimateRequest(**fields), timeout=WAIT)


@pytest.mark.parametrize(
    ("fields", "code", "reason", "names"),
    [
        ({}, "INVALID_ARGUMENT", "INVALID_FIELD", ["prompt"]),
        ({"text": ""}, "INVALID_ARGUMENT", "INVALID_FIELD", ["text"]),
        ({"token_ids": pb.TokenIds(ids=[258])}, "INVALID_ARGUMENT", "INVALID_FIELD", ["token_ids.ids"]),
        ({"text": "x" * KV_CAPACITY}, "INVALID_ARGUMENT", "PROMPT_EXCEEDS_KV_CAPACITY", []),
        ({"text": "x", "model": "other"}, "NOT_FOUND", "UNKNOWN_MODEL", []),
    ],
)
def test_refusals(service: Service, fields: dict[str, Any], code: str, reason: str, names: list[str]) -> None:
    with refused(code, reason) as refusal:
        estimate(service.client, **fields)
    assert refusal.got.fields == names
    assert service.metrics.read().values["requests_rejected_total"][reason.lower(),] == 1


def test_a_server_that_drains_says_so(service: Service) -> None:
    service.rig.engine.drain(retry_after_seconds=3)
    with refused("UNAVAILABLE", "DRAINING"):
        estimate(service.client, text="x")


def test_before_there_is_a_model_times_are_unset(service: Service) -> None:
    answer = estimate(service.client, chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]))
    assert answer == insight_pb2.EstimateResponse(prompt_tokens=len("[user]hi>"))


def test_what_is_estimated_is_what_comes_to_pass(make_service: Callable[..., Service]) -> None:
    """On a machine of known cost, and nothing of an estimate stays in the server."""
    clock = FakeClock()
    service = make_service(clock=clock)

    def on_step(plan: StepPlan) -> None:
        clock.now += 0.01 + sum(0.002 * chunk.length for chunk in plan.chunks)

    service.rig.runner.on_step = on_step
    for length in (100, 200, 300, 400):
        service.client.generate(text=chr(64 + length // 100) * length, stop=stop(20))
    forecast = estimate(service.client, text="n" * 700)
    assert (forecast.prompt_tokens, forecast.cached_tokens) == (700, 0)
    assert forecast.extrapolated
    assert forecast.samples == 2 + 4 + 5 + 7  # of 64 tokens and less
    assert forecast.queue.ToNanoseconds() == forecast.stall_for_others.ToNanoseconds() == 0
    assert forecast.gap_after.ToTimedelta().total_seconds() == pytest.approx(0.012, rel=0.1)
    expected = forecast.time_to_first_token.ToTimedelta().total_seconds()
    assert expected == pytest.approx(11 * 0.01 + 700 * 0.002, rel=0.05)
    assert estimate(service.client, text="D" * 400).cached_tokens == 399
    wait_until(service.is_idle, "nothing is held")


def test_the_metric_of_it_is_of_now_when_all_that_waited_have_left(make_metrics: Callable[..., Metrics]) -> None:
    clock = FakeClock()
    rig = Rig(make_metrics(clock), num_blocks=1000, clock=clock)

    def on_step(plan: StepPlan) -> None:
        clock.now += 0.01 + sum(0.002 * chunk.length for chunk in plan.chunks)

    def shown() -> float:
        return rig.metrics.read().values["predicted_ttft_seconds"][()]

    rig.runner.on_step = on_step
    rig.submit("warm-up", prompt="w" * 640, max_new_tokens=20)
    rig.recorder.end_of("warm-up")
    rig.runner.hold()
    jobs = [rig.submit(str(number), prompt=str(number) * 640, max_new_tokens=9) for number in range(9)]
    rig.runner.allow(10)
    rig.runner.wait_until_held()
    crowded = shown()
    rig.engine.inbox.cancel(*jobs)
    rig.runner.allow()
    now, _ = (rig.engine.estimate(b"n" * 32, "").result(WAIT) for _ in range(2))
    rig.close()
    assert now.first_token is not None
    assert shown() == pytest.approx(now.first_token)
    assert crowded > 2 * shown()


def test_a_real_model_takes_about_as_long_as_estimated(serve: Callable[..., Any], tiny_model_path: Path) -> None:
    """Prompts of several lengths: the median of what the forecasts are off by is small. Single ones may be off by as
    much as the machine is busy with other things."""
    client = serve(tiny_model_path, "--threads", "1").connect()
    ratios: list[float] = []
    for repeat in range(5):
        for length in (50, 300, 1000, 2000, 3000):
            ids = pb.TokenIds(ids=[(7919 * (i + 31 * repeat + length)) % 300 for i in range(length)])
            forecast = estimate(client, token_ids=ids).time_to_first_token.ToTimedelta().total_seconds()
            timings = client.generate(token_ids=ids, stop=stop(3, ignore_eos=True)).finished.timings
            actual = timings.time_to_first_token.ToTimedelta().total_seconds()
            assert timings.HasField("predicted_time_to_first_token") >= (repeat > 0)
            if repeat:
                ratios.append(actual / forecast)
    client.close()
    assert 0.6 < statistics.median(ratios) < 1.7, ratios


def test_an_answer_says_how_long_others_prompts_held_it_up(make_service: Callable[..., Service]) -> None:
    """Level TIMING: each token's gap, what it would have been alone, and the part that a prompt caused."""
    clock, beside = FakeClock(), list[Any]()
    service = make_service(clock=clock)
    timing = stats_pb2.StatsOptions(level=stats_pb2.STATS_LEVEL_TIMING)

    def on_step(plan: StepPlan) -> None:  # on the engine's thread
        clock.now += 0.01 + sum(0.002 * chunk.length for chunk in plan.chunks if not chunk.is_decode)
        if not beside and any(chunk.request_id == "stream" and chunk.end > 50 for chunk in plan.chunks):
            request = pb.GenerateRequest(text="n" * 300, stop=stop(1), stats=timing)
            beside.append(service.client.generation.Generate.future(request, timeout=WAIT))
            wait_until(lambda: service.rig.engine.inbox.num_live == 2, "it has arrived")

    service.rig.runner.on_step = on_step
    for length in (100, 200, 300):
        service.client.generate(text=chr(64 + length // 100) * length, stop=stop(20))
    stream = service.client.stream(text="s" * 20, request_id="stream", stop=stop(900), stats=timing)
    suffered = stream.finished.stats.stall_suffered.ToNanoseconds()
    caused = beside[0].result(WAIT).finished.stats
    tokens = [token for delta in stream.deltas for token in delta.stats]
    assert suffered == pytest.approx(300 * 0.002e9, rel=0.1)
    assert caused.stall_caused.ToNanoseconds() == suffered
    assert (caused.prefill_chunks, stream.finished.stats.prefill_chunks) == (5, 1)
    assert sum(token.stall.ToNanoseconds() for token in tokens) == pytest.approx(suffered, abs=900)
    assert not tokens[0].HasField("predicted_gap")
    assert all(token.predicted_gap.ToNanoseconds() == pytest.approx(0.01e9, rel=0.1) for token in tokens[1:])
