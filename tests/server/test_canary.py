"""Canaries run beside the clients' requests, give way to them, and are none of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from pagestream.model.sampling import NonFiniteLogitsError
from pagestream.server import canary as canary_module
from pagestream.server.canary import Canary
from pagestream.server.probes import LENGTHS, make_probes
from tests.support.fakes import END, LONG, ByteTokenizer
from tests.support.service import Service, served, stop
from tests.support.waiting import WAIT, wait_until


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary_module, "_REST", 0)


@pytest.fixture
def start(service: Service) -> Iterator[Callable[[], Future[Any]]]:
    """Starts canaries in the service's event loop."""
    started: list[Future[Any]] = []

    def run() -> Future[Any]:
        tokenizer = ByteTokenizer()
        canary = Canary(served(service.rig, tokenizer), service.streams, service.tokenizing, service.metrics, 0.001)
        started.append(asyncio.run_coroutine_threadsafe(canary.run(), service.loop))
        return started[-1]

    yield run
    for future in started:
        future.cancel()


def values(service: Service, name: str) -> dict[tuple[str, ...], float]:
    return service.metrics.read().values[name]


def runs(service: Service, result: str) -> float:
    return values(service, "canary_runs_total")[result,]


def test_probes_have_the_lengths_they_say_and_hold_their_answers() -> None:
    tokenizer = ByteTokenizer()
    probes = make_probes(tokenizer, 300, 5000)
    assert [(probe.task, probe.length) for probe in probes] == [
        (task, length) for length in LENGTHS[:3] for task in ("copy", "key_value")
    ]
    assert make_probes(tokenizer, 300, 5000) == probes, "the same at each start"
    for probe in probes:
        tokens = [*probe.prompt, *probe.answer]
        assert 0.9 * probe.length < len(tokens) <= probe.length
        assert max(tokens) <= LONG
        assert END not in tokens
        if probe.task == "copy":
            half = len(tokens) // 2
            assert tokens[:half] == tokens[half:]
        else:
            lines = tokenizer.decode(tokens).splitlines()
            assert lines[0] == lines[-1]
            assert len(set(lines)) == len(lines) - 1
            assert tokenizer.decode(probe.answer).isdigit()


def test_canaries_are_scored_again_and_again_and_are_no_requests(
    service: Service, start: Callable[[], Future[Any]]
) -> None:
    start()
    wait_until(lambda: runs(service, "ok") >= 6, "each has run three times")
    expected = {("copy", "256"), ("key_value", "256")}  # a quarter of the pool
    assert values(service, "canary_logprob").keys() == expected
    assert values(service, "canary_logprob") == values(service, "canary_baseline_logprob")
    assert all(-1 <= value < 0 for value in values(service, "canary_logprob").values())
    reading = service.metrics.read()
    assert not any(reading.values["requests_finished_total"].values())
    assert reading.values["output_tokens_total"][()] == 0
    assert reading.values["prefix_cache_hit_tokens_total"][()] == 0, "each run computes all of it"
    for name in ("queue_time_seconds", "prefill_time_seconds", "request_duration_seconds", "request_prompt_tokens"):
        assert not reading.histograms[name].counts.any(), name


def test_a_client_does_not_wait_for_a_canary(service: Service, start: Callable[[], Future[Any]]) -> None:
    service.rig.runner.hold()
    start()
    service.rig.runner.wait_until_held()
    call = service.client.open(text="abc", stop=stop(4))
    assert next(call).HasField("accepted")
    service.rig.runner.allow()
    wait_until(lambda: runs(service, "skipped") >= 1, "it gave way")
    assert "".join(event.delta.text for event in call) == "abca"
    finished = values(service, "requests_finished_total")
    assert {reason: count for reason, count in finished.items() if count} == {("max_tokens",): 1}


def test_none_starts_while_requests_wait(service: Service, start: Callable[[], Future[Any]]) -> None:
    service.rig.runner.hold()
    service.rig.submit("one")
    service.rig.runner.wait_until_held()
    service.rig.submit("two")
    start()
    wait_until(lambda: runs(service, "skipped") >= 2, "two were due")
    assert service.rig.engine.inbox.num_live == 2


def test_a_canary_that_fails_is_counted(
    service: Service, start: Callable[[], Future[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(plan: object) -> None:
        raise NonFiniteLogitsError(plan.chunks[0].request_id)  # type: ignore[attr-defined]

    service.rig.runner.on_step = fail
    start()
    wait_until(lambda: runs(service, "failed") >= 1, "one has failed")
    assert "canary copy of 256 tokens" in caplog.text
    assert not values(service, "canary_logprob")


def test_what_runs_when_they_are_stopped_is_let_go(service: Service, start: Callable[[], Future[Any]]) -> None:
    service.rig.runner.hold()
    running = start()
    service.rig.runner.wait_until_held()
    running.cancel()
    with pytest.raises(CancelledError):
        running.result(WAIT)
    service.run(service.streams.all_closed())
    service.rig.runner.allow()
    wait_until(lambda: service.rig.engine.inbox.num_live == 0, "the engine has let go")
    wait_until(service.is_idle, "everything is free")
