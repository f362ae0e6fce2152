"""pagestream.v1 over grpc.aio."""

from __future__ import annotations

import asyncio

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from pagestream.loadtest.credentials import Credentials
from pagestream.loadtest.record import Record, ServerTimings
from pagestream.loadtest.shapes import Vocabulary
from pagestream.loadtest.target import Call, Target, TargetError, TargetInfo
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import model_pb2
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub
from pagestream.v1.model_pb2_grpc import ModelServiceStub

_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1))
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
_DESCRIBE_SECONDS = 10.0


class GrpcTarget(Target):
    """One channel, and one more for each call whose connection is to be cut."""

    def __init__(self, address: str, credentials: Credentials) -> None:
        """Raises OSError for a file of credentials that cannot be read."""
        self._address = address
        self._tls, self._metadata = credentials.for_grpc(), credentials.headers
        self._channel = self._open(_OPTIONS)
        self._stub = GenerationServiceStub(self._channel)

    def _open(self, options: tuple[tuple[str, int], ...]) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self._address, options=options)
        return grpc.aio.secure_channel(self._address, self._tls, options=options)

    async def describe(self) -> TargetInfo:
        ask = ModelServiceStub(self._channel).GetModel
        try:
            response = await ask(model_pb2.GetModelRequest(), timeout=_DESCRIBE_SECONDS, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise TargetError(_why_not(self._address, error)) from error
        model = response.model
        special = set(model.eos_token_ids) | ({model.bos_token_id} if model.HasField("bos_token_id") else set())
        context = min(model.max_context_tokens, model.kv_capacity_tokens)
        details = {
            name: getattr(model, name)
            for name in ("architecture", "parameters", "device", "dtype", "kv_dtype", "page_size", "kv_capacity_tokens")
        }
        return TargetInfo(model.name, Vocabulary(model.vocab_size, frozenset(special)), context, details)

    async def send(self, call: Call, record: Record) -> list[int]:
        answer: list[int] = []
        cuts = call.fault is not None and call.fault.kind == "kill"
        channel = self._open(_OPTIONS + _OWN_CONNECTION) if cuts else None
        stub = GenerationServiceStub(channel) if channel else self._stub
        deadline = call.fault.seconds if call.fault and call.fault.kind == "deadline" else call.timeout
        stream = stub.GenerateStream(_request(call), timeout=deadline, metadata=self._metadata)
        try:
            async for event in stream:
                self._note(event, record, answer)
                if call.leaves_now(len(answer)):
                    record.outcome = "killed" if cuts else "cancelled"
                    break
                if call.pause:
                    await asyncio.sleep(call.pause)
        except grpc.aio.AioRpcError as error:
            record.fail(error.code().name, _reason(error), error.details() or "")
        finally:
            if channel:
                await channel.close(grace=None)
            else:
                stream.cancel()  # nothing happens if it has ended
        return answer

    def _note(self, event: pb.GenerateStreamResponse, record: Record, answer: list[int]) -> None:
        now = self.clock()
        match event.WhichOneof("event"):
            case "accepted":
                record.accepted = now
            case "delta":
                record.tokens += [now] * len(event.delta.token_ids)
                answer += event.delta.token_ids
                record.output_tokens = len(answer)
            case "finished":
                usage = event.finished.usage
                record.outcome = "ok"
                record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.output_tokens
                record.cached_tokens, record.preemptions = usage.cached_tokens, usage.preemptions
                record.server = _timings(event.finished.timings)

    async def close(self) -> None:
        await self._channel.close()


def _why_not(address: str, error: grpc.aio.AioRpcError) -> str:
    if _reason(error):  # only a pagestream server gives one
        return f"the server at {address} cannot be measured: {error.details()}"
    return f"no pagestream server answers at {address} ({error.details()}); start one with: pagestream serve"


def _request(call: Call) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=call.prompt),
        stop=pb.StopConfig(max_tokens=call.new_tokens, ignore_eos=True),
        output=pb.OutputConfig(token_ids=True),
    )


def _timings(timings: pb.Timings) -> ServerTimings:
    predicted = timings.HasField("predicted_time_to_first_token")
    return ServerTimings(
        queue=_seconds(timings.queue),
        prefill=_seconds(timings.prefill),
        decode=_seconds(timings.decode),
        time_to_first_token=_seconds(timings.time_to_first_token),
        predicted_time_to_first_token=_seconds(timings.predicted_time_to_first_token) if predicted else None,
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _reason(error: grpc.aio.AioRpcError) -> str:
    """ErrorInfo.reason of the status's details, empty without."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    return next((info.reason for detail in (status.details if status else ()) if detail.Unpack(info)), "")
