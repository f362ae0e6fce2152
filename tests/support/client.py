"""A gRPC client whose calls all have a deadline and that accepts no stream that breaks the protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub
from pagestream.v1.insight_pb2_grpc import InsightServiceStub
from pagestream.v1.model_pb2_grpc import ModelServiceStub
from pagestream.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from tests.support.waiting import WAIT

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)  # else channels to one address share a connection

_ANY_SIZE = ("grpc.max_receive_message_length", -1)


@dataclass
class Answer:
    """A stream that ended well."""

    accepted: pb.Accepted
    progress: list[pb.PrefillProgress] = field(default_factory=list)
    deltas: list[pb.Delta] = field(default_factory=list)
    finished: pb.Finished = field(default_factory=pb.Finished)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def logprobs(self) -> list[pb.TokenLogprob]:
        return [logprob for delta in self.deltas for logprob in delta.logprobs]


def gather(events: Iterable[pb.GenerateStreamResponse]) -> Answer:
    """Checks the order of events: Accepted first, Finished last, each once. A stream that ends OK without Finished
    fails here, whatever a test is about.
    """
    seen = list(events)
    kinds = [event.WhichOneof("event") for event in seen]
    assert kinds[:1] == ["accepted"], kinds
    assert kinds[-1] == "finished", kinds
    assert set(kinds[1:-1]) <= {"prefill_progress", "delta"}, kinds
    answer = Answer(seen[0].accepted, finished=seen[-1].finished)
    answer.progress = [event.prefill_progress for event in seen if event.HasField("prefill_progress")]
    answer.deltas = [event.delta for event in seen if event.HasField("delta")]
    assert answer.finished.reason != pb.FINISH_REASON_UNSPECIFIED
    return answer


class Client:
    def __init__(self, address: str, *options: tuple[str, Any]) -> None:
        self.channel = grpc.insecure_channel(address, options=[_OWN_CONNECTION, _ANY_SIZE, *options])
        self.generation = GenerationServiceStub(self.channel)
        self.tokenizer = TokenizerServiceStub(self.channel)
        self.models = ModelServiceStub(self.channel)
        self.insight = InsightServiceStub(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    def open(self, timeout: float = WAIT, tenant: str | None = None, **fields: Any) -> Any:
        """A stream, to be read by the caller."""
        metadata = None if tenant is None else (("x-pagestream-tenant", tenant),)
        return self.generation.GenerateStream(pb.GenerateStreamRequest(**fields), timeout=timeout, metadata=metadata)

    def stream(self, timeout: float = WAIT, **fields: Any) -> Answer:
        return gather(self.open(timeout, **fields))

    def generate(self, timeout: float = WAIT, **fields: Any) -> pb.GenerateResponse:
        return self.generation.Generate(pb.GenerateRequest(**fields), timeout=timeout)

    def health(self, service: str = "", timeout: float = WAIT) -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        return self._health.Check(request, timeout=timeout).status

    def watch(self, service: str = "") -> Iterator[int]:
        call = self._health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=WAIT)
        return (response.status for response in call)

    def close(self) -> None:
        self.channel.close()


@dataclass(frozen=True)
class Refusal:
    """A status and what its google.rpc details say."""

    code: grpc.StatusCode
    message: str
    reason: str | None
    fields: list[str]
    retry_after: float | None
    usage: pb.Usage | None = None


def refusal_of(error: grpc.RpcError) -> Refusal:
    status = rpc_status.from_call(error)
    reason, fields, retry_after, used = None, [], None, None
    for detail in status.details if status else ():
        info, bad, retry, usage = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
            pb.Usage(),
        )
        if detail.Unpack(info):
            assert (reason, info.domain) == (None, "pagestream")
            reason = info.reason
        elif detail.Unpack(bad):
            fields = [violation.field for violation in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Unpack(usage):
            used = usage
    return Refusal(error.code(), error.details(), reason, fields, retry_after, used)


class Refused:
    """What `refused` caught, once its block is left."""

    got: Refusal


@contextmanager
def refused(code: str, reason: str | None) -> Iterator[Refused]:
    """The block must end in this status with this reason in its details."""
    caught = Refused()
    with pytest.raises(grpc.RpcError) as error:
        yield caught
    caught.got = refusal_of(error.value)
    assert (caught.got.code.name, caught.got.reason) == (code, reason), caught.got
