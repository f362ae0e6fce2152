"""OpenTelemetry spans: a request with its time in the queue, in prefill and in decode, made when the call is over.

The exporter reads the OTEL_* variables itself. Attributes are those of the GenAI semantic conventions; no texts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pagestream.server.call import Call
from pagestream.server.job import Job

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

_CLOSE_SECONDS = 3.0
_PHASES = ("queue", "prefill", "decode")
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracer:
    """A sink of the interceptor. Spans are queued and sent by a thread of the library's."""

    def __init__(self, model_name: Callable[[], str | None]) -> None:
        self._model_name = model_name
        resource = Resource({"service.name": "pagestream"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("pagestream.server")

    def __call__(self, call: Call) -> None:
        """Calls that only asked for facts and got them have no span."""
        if not call.jobs and call.status == "OK":
            return
        parent = _PROPAGATOR.extract({"traceparent": call.traceparent}) if call.traceparent else None
        start = int(call.received_unix * 1e9)
        model = self._model_name() or ""
        span = self._tracer.start_span(
            f"text_completion {model}".rstrip(),
            context=parent,
            kind=SpanKind.SERVER,
            attributes=_attributes(call, model),
            start_time=start,
        )
        if call.error is not None:
            span.set_status(Status(StatusCode.ERROR, call.error.reason))
        inside = set_span_in_context(span)
        for job in call.jobs:
            began = start + int((job.received - call.received) * 1e9)
            timings = job.timings()
            for phase in _PHASES:
                seconds = getattr(timings, phase)
                if seconds is None:
                    break
                ended = began + int(seconds * 1e9)
                child = self._tracer.start_span(phase, inside, attributes=_answer(job), start_time=began)
                child.end(ended)
                began = ended
        span.end(start + int(call.seconds * 1e9))

    def close(self) -> None:
        """Sends what is queued, if the receiver takes it soon: to a dead one the library goes on for half a minute."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_CLOSE_SECONDS)


def _attributes(call: Call, model: str) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "pagestream",
        "gen_ai.request.model": model,
        "rpc.system": "grpc",
        "rpc.method": call.method.lstrip("/"),
        "rpc.grpc.status_code": call.status,
    }
    if call.error is not None:
        attributes["error.type"] = call.error.reason
    if call.jobs:
        request = call.jobs[0].request
        sampling = request.sampling
        reasons = [job.finish_reason.value for job in call.jobs if job.finish_reason is not None]
        attributes |= {
            "gen_ai.response.id": request.request_id,
            "gen_ai.request.max_tokens": request.max_new_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.seed": str(sampling.seed),  # 64 bits without a sign: more than a number here can be
            "gen_ai.request.choice.count": len(call.jobs),
            "gen_ai.response.finish_reasons": reasons,
            "gen_ai.usage.input_tokens": request.num_prompt_tokens,
            "gen_ai.usage.output_tokens": sum(job.request.num_output_tokens for job in call.jobs),
            "pagestream.cached_tokens": request.num_cached or 0,
            "pagestream.preemptions": sum(job.request.num_preemptions for job in call.jobs),
        }
    return attributes


def _answer(job: Job) -> dict[str, AttributeValue]:
    return {"pagestream.answer": job.index}
