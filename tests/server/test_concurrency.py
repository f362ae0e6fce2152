"""Clients beside each other: slow ones, many, and those that ping."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health

from pagestream.model.step import StepPlan
from pagestream.v1 import generation_pb2 as pb
from tests.support.client import Client
from tests.support.fakes import LONG, LONG_TEXT
from tests.support.service import Service, stop
from tests.support.waiting import WAIT, wait_until

MakeService = Callable[..., Service]


def test_a_reader_that_stops_reading_holds_nobody_up(service: Service) -> None:
    """Few enough tokens wait for it that its answer is finished and its blocks are free long before it reads on; then
    it gets all of it.
    """
    silent = service.client.open(token_ids=pb.TokenIds(ids=[LONG]), stop=stop(1000))
    next(silent)
    other = Client(service.address)
    assert other.stream(text="ab", stop=stop(200)).text == "ab" * 100
    wait_until(lambda: service.metrics.snapshot.active_blocks == 0, "the silent one's answer is complete")
    streams = service.metrics.read().values["grpc_active_streams"]
    assert streams["/pagestream.v1.GenerationService/GenerateStream",] == 1  # it waits for its reader
    assert "".join(event.delta.text for event in silent) == LONG_TEXT * 1000
    other.close()


def test_an_id_used_again_while_its_last_reader_is_slow_gets_its_own_answer(service: Service) -> None:
    slow = service.client.open(token_ids=pb.TokenIds(ids=[LONG]), request_id="id", stop=stop(1000))
    next(slow)
    wait_until(lambda: service.metrics.read().values["requests_finished_total"]["max_tokens",] == 1, "it has finished")
    assert service.client.stream(text="new", request_id="id", stop=stop(6)).text == "newnew"
    assert "".join(event.delta.text for event in slow) == LONG_TEXT * 1000


def test_many_streams_at_once_each_get_their_own_answer(make_service: MakeService) -> None:
    service = make_service(num_blocks=40, max_running=32, token_budget=64)
    prompts = [f"prompt {number} " for number in range(40)]
    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(lambda text: service.client.stream(text=text, stop=stop(60)).text, prompts))
    assert answers == [(prompt * 60)[:60] for prompt in prompts]
    wait_until(service.is_idle, "the blocks are free")
    assert service.rig.pool.num_active == 0


def test_pings_during_a_silent_call_get_nobody_sent_away(service: Service) -> None:
    """The same client is sent away by a server with gRPC's own settings, so the pings are really there."""
    pings = (("grpc.keepalive_time_ms", 200), ("grpc.keepalive_permit_without_calls", 1))
    pings += (("grpc.http2.max_pings_without_data", 0),)

    async def open_strict() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    strict, port = service.run(open_strict())
    service.rig.runner.hold()
    pinging, control = Client(service.address, *pings), Client(f"127.0.0.1:{port}", *pings)
    silent = pinging.open(text="ab", stop=stop(4))
    assert next(silent).HasField("accepted")
    with pytest.raises(grpc.RpcError, match="Too many pings"):
        for _ in control.watch("nothing"):
            pass
    service.rig.runner.allow()
    assert "".join(event.delta.text for event in silent) == "abab"
    control.close()
    pinging.close()
    service.run(strict.stop(None))


def test_a_slow_reader_that_leaves_is_forgotten(service: Service) -> None:
    slow = service.client.open(token_ids=pb.TokenIds(ids=[LONG]), stop=stop(1000))
    next(slow)
    wait_until(lambda: service.metrics.snapshot.active_blocks == 0, "its answer is complete")
    slow.cancel()
    service.run(asyncio.wait_for(service.streams.all_closed(), WAIT))
    wait_until(service.is_idle, "its call is over")


def test_tenants_share_the_reading_of_prompts(service: Service) -> None:
    """Of three equal prompts the latest, another tenant's, gets as many tokens in each step as the two before it."""
    service.rig.runner.hold()
    first = service.client.open(text="x", stop=stop(1))
    next(first)
    service.rig.runner.wait_until_held()
    calls = [
        service.client.open(text="x" * 200, request_id=name, stop=stop(1), tenant=tenant)
        for name, tenant in (("a1", "a"), ("a2", "a"), ("b", "b"))
    ]
    for call in calls:
        next(call)
    read: list[dict[str, int]] = []
    tenants: set[str] = set()

    def on_step(plan: StepPlan) -> None:
        read.append({chunk.request_id: chunk.length for chunk in plan.chunks})
        tenants.update(request.tenant for request in service.rig.scheduler.running)

    service.rig.runner.on_step = on_step
    service.rig.runner.allow()
    for call in (first, *calls):
        list(call)
    assert read[1] == {"a1": 32, "b": 32}
    assert len(tenants) == 3
    assert tenants.isdisjoint({"a", "b"})  # nobody needs to know what they call themselves


def test_a_priority_reaches_the_scheduler(make_service: MakeService) -> None:
    service = make_service(max_running=1)
    service.rig.runner.hold()
    first = service.client.open(text="x", request_id="first", stop=stop(1))
    next(first)
    service.rig.runner.wait_until_held()
    priorities = {"low": pb.PRIORITY_LOW, "none": pb.PRIORITY_UNSPECIFIED, "high": pb.PRIORITY_HIGH}
    calls = [
        service.client.open(text="x", request_id=name, stop=stop(1), priority=priority)
        for name, priority in priorities.items()
    ]
    for call in calls:
        next(call)
    order: list[str] = []
    service.rig.runner.on_step = lambda plan: order.extend(chunk.request_id for chunk in plan.chunks)
    service.rig.runner.allow()
    for call in calls:
        assert [event.WhichOneof("event") for event in call][-1] == "finished"
    assert order == ["first", "high", "none", "low"]
