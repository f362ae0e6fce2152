"""Spans over the real wire: an OTLP receiver in this process, fed by the exporter that a server uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from pagestream.server.config import wants_traces
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.model_pb2 import GetModelRequest
from tests.support.client import gather, refused
from tests.support.service import Service, stop
from tests.support.waiting import WAIT, wait_until

collector = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc", reason="extra otel")
pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.trace_exporter", reason="extra otel")

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Receiver(collector.TraceServiceServicer):  # type: ignore[misc,name-defined]  # without stubs
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()

    def Export(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the proto's name
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        for part in request.resource_spans:
            self.services |= {a.value.string_value for a in part.resource.attributes if a.key == "service.name"}
            self.spans += [span for scope in part.scope_spans for span in scope.spans]
        return ExportTraceServiceResponse()


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    server = grpc.server(ThreadPoolExecutor(2))
    receiver = Receiver()
    collector.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    yield receiver
    server.stop(0)


@pytest.fixture
def traced(make_service: Callable[..., Service], receiver: Receiver) -> Iterator[tuple[Service, Callable[[], None]]]:
    """A service with a tracer, and what sends its spans."""
    from pagestream.server.tracing import Tracer

    tracer = Tracer(lambda: "echo")
    calls: list[object] = []

    def send() -> None:
        wait_until(lambda: calls, "a call has been reported")
        tracer.close()

    yield make_service(listening={"sinks": [tracer, calls.append]}), send
    tracer.close()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_request_is_a_span_with_its_phases_under_the_callers_own(
    traced: tuple[Service, Callable[[], None]], receiver: Receiver
) -> None:
    service, send = traced
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
    request = pb.GenerateStreamRequest(
        text="secret", request_id="id", stop=stop(5), sampling=pb.SamplingConfig(temperature=0.5)
    )
    finished = gather(service.client.generation.GenerateStream(request, timeout=WAIT, metadata=metadata)).finished
    wait_until(service.is_idle, "the call is over")
    send()
    spans = {span.name: span for span in receiver.spans}
    assert spans.keys() == {"text_completion echo", "queue", "prefill", "decode"}
    assert receiver.services == {"pagestream"}
    whole = spans.pop("text_completion echo")
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (TRACE, PARENT)
    facts = attributes(whole)
    assert facts["gen_ai.request.model"] == "echo"
    assert (facts["gen_ai.usage.input_tokens"], facts["gen_ai.usage.output_tokens"]) == (6, 5)
    assert (facts["gen_ai.response.id"], facts["gen_ai.request.temperature"]) == ("id", 0.5)
    assert [value.string_value for value in facts["gen_ai.response.finish_reasons"].values] == ["max_tokens"]
    for name, span in spans.items():
        assert (span.trace_id, span.parent_span_id) == (whole.trace_id, whole.span_id)
        told = getattr(finished.timings, name).ToTimedelta().total_seconds()
        assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 == pytest.approx(told, abs=2e-6)
    assert spans["queue"].end_time_unix_nano == spans["prefill"].start_time_unix_nano
    assert spans["prefill"].end_time_unix_nano == spans["decode"].start_time_unix_nano
    assert whole.start_time_unix_nano <= spans["queue"].start_time_unix_nano
    assert spans["decode"].end_time_unix_nano <= whole.end_time_unix_nano
    assert b"secret" not in b"".join(span.SerializeToString() for span in receiver.spans)


def test_a_refusal_is_a_failed_span_and_facts_are_none(
    traced: tuple[Service, Callable[[], None]], receiver: Receiver
) -> None:
    service, send = traced
    with refused("NOT_FOUND", "UNKNOWN_MODEL"):
        service.client.stream(text="x", model="other")
    service.client.models.GetModel(GetModelRequest(), timeout=WAIT)
    wait_until(service.is_idle, "the calls are over")
    send()
    [span] = receiver.spans
    assert span.status.code == 2  # error
    facts = attributes(span)
    assert (facts["error.type"], facts["rpc.grpc.status_code"]) == ("UNKNOWN_MODEL", "NOT_FOUND")


def test_spans_are_wanted_only_where_the_environment_names_a_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert not wants_traces()
    for name in names:
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://localhost:4317")
            assert wants_traces()
