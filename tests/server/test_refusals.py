"""Every refusal and failure is one status with one reason, and leaves nothing behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pagestream.server.inbox import QueueLimits
from pagestream.server.metric_families import SECONDS
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import tokenizer_pb2
from tests.support.client import gather, refused
from tests.support.service import KV_CAPACITY, MAX_CONTEXT, Service, stop
from tests.support.waiting import WAIT, wait_until

MakeService = Callable[..., Service]
_BAD = ("INVALID_ARGUMENT", "INVALID_FIELD")


@pytest.mark.parametrize("method", ["stream", "generate"])
@pytest.mark.parametrize(
    ("fields", "code", "reason", "bad"),
    [
        ({}, "INVALID_ARGUMENT", "INVALID_FIELD", ["prompt"]),
        ({"text": ""}, "INVALID_ARGUMENT", "INVALID_FIELD", ["text"]),
        ({"text": "x", "sampling": {"top_p": 2}}, "INVALID_ARGUMENT", "INVALID_FIELD", ["sampling.top_p"]),
        ({"text": "x", "stop": {"max_tokens": 0}}, "INVALID_ARGUMENT", "INVALID_FIELD", ["stop.max_tokens"]),
        ({"text": "x", "output": {"logprobs": 99}}, "INVALID_ARGUMENT", "INVALID_FIELD", ["output.logprobs"]),
        ({"token_ids": {"ids": [258]}}, "INVALID_ARGUMENT", "INVALID_FIELD", ["token_ids.ids"]),
        (
            {"text": "x", "output": {"progress_interval": Duration(seconds=2**60)}},
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            ["output.progress_interval"],
        ),
        ({"text": "x", "queue_timeout": Duration()}, "INVALID_ARGUMENT", "INVALID_FIELD", ["queue_timeout"]),
        ({"text": "x", "priority": 9}, "INVALID_ARGUMENT", "INVALID_FIELD", ["priority"]),
        ({"text": "x", "n": 17}, "INVALID_ARGUMENT", "INVALID_FIELD", ["n"]),
        ({"text": "x" * (8 * 2**20 + 1)}, "INVALID_ARGUMENT", "INVALID_FIELD", ["text"]),
        ({"chat": {"messages": [{"role": "r", "content": "x" * 2**22}] * 2}}, *_BAD, ["chat.messages"]),
        ({"text": "x", "request_id": "é" * 65}, *_BAD, ["request_id"]),
        ({"text": "x", "stop": {"stop_strings": ["x"] * 17}}, *_BAD, ["stop.stop_strings"]),
        ({"text": "x", "stop": {"stop_strings": ["é" * 257]}}, *_BAD, ["stop.stop_strings[0]"]),
        ({"text": "x", "stop": {"stop_token_ids": [1] * 65}}, *_BAD, ["stop.stop_token_ids"]),
        ({"text": "x", "sampling": {"logit_bias": dict.fromkeys(range(1025), 1.0)}}, *_BAD, ["sampling.logit_bias"]),
        ({"text": "x" * MAX_CONTEXT}, "INVALID_ARGUMENT", "PROMPT_EXCEEDS_MODEL_CONTEXT", []),
        ({"text": "x" * KV_CAPACITY}, "INVALID_ARGUMENT", "PROMPT_EXCEEDS_KV_CAPACITY", []),
        ({"text": "x", "model": "models/other"}, "NOT_FOUND", "UNKNOWN_MODEL", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_is_one_status_and_one_reason(
    service: Service, method: str, fields: dict[str, Any], code: str, reason: str, bad: list[str]
) -> None:
    with refused(code, reason) as refusal:
        getattr(service.client, method)(**fields)
    assert refusal.got.fields == bad
    assert refusal.got.retry_after is None
    rejected = service.metrics.read().values["requests_rejected_total"]
    assert {labels: count for labels, count in rejected.items() if count} == {(reason.lower(),): 1}


def test_a_template_that_refuses_the_messages_is_a_bad_field_in_its_own_words(make_service: MakeService) -> None:
    client = make_service("{{ raise_exception('roles must alternate') }}").client
    with refused("INVALID_ARGUMENT", "INVALID_FIELD") as refusal:
        client.stream(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x")]))
    assert refusal.got.fields == ["chat.messages"]
    assert "roles must alternate" in refusal.got.message


def test_a_chat_that_its_template_makes_nothing_of_is_a_bad_field(make_service: MakeService) -> None:
    client = make_service("{{ messages[0].content }}").client
    with refused("INVALID_ARGUMENT", "INVALID_FIELD") as refusal:
        client.stream(chat=pb.Chat(messages=[pb.ChatMessage(role="user")]))
    assert refusal.got.fields == ["chat"]


def test_a_chat_needs_a_template(make_service: MakeService) -> None:
    client = make_service(template=None).client
    messages = [pb.ChatMessage(role="user", content="x")]
    with refused("FAILED_PRECONDITION", "NO_CHAT_TEMPLATE"):
        client.stream(chat=pb.Chat(messages=messages))
    with refused("FAILED_PRECONDITION", "NO_CHAT_TEMPLATE"):
        request = tokenizer_pb2.ApplyTemplateRequest(chat=pb.Chat(messages=messages))
        client.tokenizer.ApplyTemplate(request, timeout=WAIT)


def test_a_live_id_is_refused_and_its_stream_goes_on(service: Service) -> None:
    service.rig.runner.hold()
    first = service.client.open(text="ab", request_id="id", stop=stop(4))
    assert next(first).accepted.request_id == "id"
    with refused("ALREADY_EXISTS", "DUPLICATE_REQUEST_ID"):
        service.client.stream(text="cd", request_id="id")
    service.rig.runner.allow()
    assert "".join(event.delta.text for event in first) == "abab"
    assert service.client.stream(text="cd", request_id="id", stop=stop(2)).text == "cd"


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(make_service: MakeService) -> None:
    service = make_service(max_running=1, limits=QueueLimits(max_requests=1, max_tokens=10_000))
    service.rig.runner.hold()
    running = service.client.open(text="ab", stop=stop(3))
    next(running)
    service.rig.runner.wait_until_held()
    service.rig.runner.allow(1)  # after a step the queue is known to be empty
    service.rig.runner.wait_until_held()
    waiting = service.client.open(text="cd", stop=stop(2))
    assert next(waiting).accepted.queue_position == 0
    with refused("RESOURCE_EXHAUSTED", "QUEUE_FULL") as refusal:
        service.client.stream(text="ef")
    assert (refusal.got.retry_after or 0) >= 1
    service.rig.runner.allow()
    assert [event.delta.text for event in running][-1] is not None
    assert "".join(event.delta.text for event in waiting) == "cd"


def test_a_request_that_waits_longer_than_it_wants_to_is_told_when_to_come_back(make_service: MakeService) -> None:
    service = make_service(max_running=1)
    service.rig.runner.hold()
    running = service.client.open(text="ab", stop=stop(3))
    next(running)
    service.rig.runner.wait_until_held()
    waiting = service.client.open(text="cd", queue_timeout=Duration(nanos=1_000_000))
    next(waiting)
    service.rig.runner.allow()
    with refused("RESOURCE_EXHAUSTED", "QUEUE_TIMEOUT") as refusal:
        gather([pb.GenerateStreamResponse(accepted=pb.Accepted()), *waiting])
    assert (refusal.got.retry_after or 0) >= 1
    assert [event.delta.text for event in running][-1] is not None


def test_a_full_queue_takes_no_time_to_say_so(make_service: MakeService) -> None:
    """Before it looks at the prompt: for one of a million bytes the server needs under 5 ms, the median of twenty."""
    service = make_service(max_running=1, limits=QueueLimits(max_requests=1, max_tokens=10_000))
    service.rig.runner.hold()
    calls = [service.client.open(text="ab", stop=stop(3))]
    next(calls[0])
    service.rig.runner.wait_until_held()
    for _ in range(20):
        with refused("RESOURCE_EXHAUSTED", "QUEUE_FULL"):
            service.client.stream(text="x" * 1_000_000)
    reading = service.metrics.read()
    rejected = service.metrics._histograms["request_duration_seconds"].rows["rejected",]
    up_to = dict(
        zip((*SECONDS, math.inf), reading.histograms["request_duration_seconds"].counts[rejected], strict=True)
    )
    assert up_to[math.inf] == 20
    assert up_to[0.005] >= 10
    assert reading.histograms["tokenize_seconds"].counts[:, -1].sum() == 1  # the first one's
    service.rig.runner.allow()


def test_a_deadline_ends_the_call_and_frees_its_blocks(service: Service) -> None:
    service.rig.runner.hold()
    call = service.client.open(timeout=1, text="abc")
    with pytest.raises(grpc.RpcError) as error:
        for _ in call:
            pass
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    service.rig.runner.allow()

    def ended() -> bool:  # by the server's own clock, or by gRPC's cancel at that moment
        counts = service.metrics.read().values["requests_finished_total"]
        return counts["deadline",] + counts["cancelled",] == 1

    wait_until(ended, "the request has ended")
    wait_until(service.is_idle, "the blocks are free")


def test_a_cancel_frees_the_blocks(service: Service) -> None:
    service.rig.runner.hold()
    call = service.client.open(text="abc")
    next(call)
    service.rig.runner.wait_until_held()
    assert service.rig.pool.num_active == 1
    call.cancel()
    wait_until(service.rig.engine.inbox._has_mail, "the server has seen it")  # else the answer may end before
    service.rig.runner.allow()
    counts = service.metrics.read
    wait_until(lambda: counts().values["requests_finished_total"]["cancelled",] == 1, "the request has ended")
    wait_until(service.is_idle, "the blocks are free")


def test_a_fault_is_internal_with_the_id_and_others_go_on(service: Service) -> None:
    service.rig.runner.faults["bad"] = RuntimeError("secret internals")
    service.rig.runner.hold()
    good = service.client.open(text="good", stop=stop(8))
    bad = service.client.open(text="evil", request_id="bad")
    next(good)
    next(bad)
    service.rig.runner.allow()
    with refused("INTERNAL", "ENGINE_FAULT") as refusal:
        gather(bad)
    assert "bad" in refusal.got.message
    assert "secret" not in refusal.got.message
    assert "".join(event.delta.text for event in good) == "goodgood"


def test_a_model_that_drains_refuses_before_it_looks_at_the_prompt(service: Service) -> None:
    service.rig.engine.drain(retry_after_seconds=12.5)
    for method in (service.client.stream, service.client.generate):
        with refused("UNAVAILABLE", "DRAINING") as refusal:
            method()  # no prompt: that would be refused otherwise
        assert refusal.got.retry_after == 13
