"""A thin client over the pagestream.v1 stubs: what `generate`, `chat` and the demo share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Self

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from rich.console import Console

from pagestream.v1.generation_pb2 import Finished, FinishReason, GenerateStreamRequest, GenerateStreamResponse
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub
from pagestream.v1.insight_pb2 import EstimateRequest, EstimateResponse
from pagestream.v1.insight_pb2_grpc import InsightServiceStub
from pagestream.v1.model_pb2 import GetModelRequest, ModelInfo
from pagestream.v1.model_pb2_grpc import ModelServiceStub

_CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # a web proxy of the environment would swallow calls to localhost
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # a server that comes back is found within a second
)
_QUESTION_SECONDS = 10.0


class CallError(Exception):
    """The server refused or failed the call; the message is one sentence for the user."""


class UnreachableError(CallError):
    """No server answered."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """How a client proves itself, and how it knows the server; PEM files. Without `ca`, plain text."""

    ca: Path | None = None  # of the server's certificate
    cert: Path | None = None  # the client's own, with its key
    key: Path | None = None
    token: str | None = None

    def open(self, address: str) -> grpc.Channel:
        """Raises OSError for a file that cannot be read."""
        if self.ca is None:
            return grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        own = [file.read_bytes() if file else None for file in (self.key, self.cert)]
        credentials = grpc.ssl_channel_credentials(self.ca.read_bytes(), *own)
        return grpc.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Sent with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


ANONYMOUS = Credentials()


class Client:
    """One connection. Use it as a context manager.

    Every method raises CallError, or UnreachableError if there is no server at the address.
    """

    def __init__(self, address: str, credentials: Credentials = ANONYMOUS) -> None:
        self._address = address
        self._metadata = credentials.metadata
        self.channel = credentials.open(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()

    def model(self) -> ModelInfo:
        """The model that is served."""
        try:
            stub = ModelServiceStub(self.channel)
            return stub.GetModel(GetModelRequest(), timeout=_QUESTION_SECONDS, metadata=self._metadata).model
        except grpc.RpcError as error:
            raise self._explain(error) from error

    def estimate(self, request: EstimateRequest) -> EstimateResponse:
        """What a prompt would cost now."""
        try:
            stub = InsightServiceStub(self.channel)
            return stub.Estimate(request, timeout=_QUESTION_SECONDS, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._explain(error) from error

    def stream(self, request: GenerateStreamRequest) -> Generator[GenerateStreamResponse, None, None]:
        """The events of one answer. Closing the generator early cancels the call.

        A thread of its own reads the call: gRPC keeps its locks for ever when Ctrl-C raises KeyboardInterrupt while
        the main thread holds one, and every later call would hang.
        """
        call = GenerationServiceStub(self.channel).GenerateStream(request, metadata=self._metadata)
        arrived: SimpleQueue[GenerateStreamResponse | grpc.RpcError | None] = SimpleQueue()
        Thread(target=_read, args=(call, arrived.put), daemon=True).start()
        try:
            while (event := arrived.get()) is not None:
                if isinstance(event, grpc.RpcError):
                    raise self._explain(event) from event
                yield event
        finally:
            call.cancel()  # nothing happens if the answer is complete

    def _explain(self, error: grpc.RpcError) -> CallError:
        status = rpc_status.from_call(error)
        if status is None and error.code() is grpc.StatusCode.UNAVAILABLE:  # from our side: there is no connection
            cause = (error.details() or "").rpartition(": ")[2]
            return UnreachableError(
                f"no pagestream server answers at {self._address} ({cause}); start one with: pagestream serve"
            )
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        for detail in status.details if status else ():
            for known in (info, retry):
                if detail.Is(known.DESCRIPTOR):
                    detail.Unpack(known)
        sentence = f"{error.code().name} {info.reason}".rstrip() + f": {error.details()}"
        if retry.HasField("retry_delay"):
            sentence += f"; try again in {seconds_of(retry.retry_delay):g} s"
        return CallError(sentence)


def _read(
    call: Iterable[GenerateStreamResponse], put: Callable[[GenerateStreamResponse | grpc.RpcError | None], None]
) -> None:
    """Every event, then the error that ended the stream or None."""
    end = None
    try:
        for event in call:
            put(event)
    except grpc.RpcError as error:
        end = error
    finally:
        put(end)


@dataclass
class Answer:
    """What has arrived of one answer; what is there stays when the stream breaks."""

    text: str = ""
    finished: Finished | None = None

    def receive(
        self,
        events: Generator[GenerateStreamResponse, None, None],
        write: Callable[[str], object],
        terminal: Console,
    ) -> None:
        """Reads the stream to its end: text goes to `write` as it comes; until then `terminal` shows what is going on.

        Whatever ends it early (Ctrl-C, a closed pipe) closes `events`, which cancels the call.
        """
        with closing(events), terminal.status("[dim]waiting for the server") as status:
            for event in events:
                match event.WhichOneof("event"):
                    case "accepted" if event.accepted.queue_position:
                        status.update(f"[dim]in the queue behind {event.accepted.queue_position}")
                    case "prefill_progress":
                        progress = event.prefill_progress
                        status.update(
                            f"[dim]reading the prompt: {progress.computed_tokens:,} of {progress.total_tokens:,} tokens"
                        )
                    case "delta" if event.delta.text:
                        status.stop()
                        self.text += event.delta.text
                        write(event.delta.text)
                    case "finished":
                        self.finished = event.finished


def summary(finished: Finished) -> str:
    """One line on what an answer cost, by the server's clock."""
    usage, timings = finished.usage, finished.timings
    cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
    parts = [f"{usage.prompt_tokens:,} prompt tokens{cached}"] if usage.prompt_tokens else []  # else counted before
    parts += [
        f"{usage.output_tokens:,} answer tokens",
        f"first token after {seconds_of(timings.time_to_first_token):.2f} s",
    ]
    decode = seconds_of(timings.decode)
    if decode > 0:  # from the first token to the last: one gap fewer than tokens
        parts.append(f"{(usage.output_tokens - 1) / decode:.1f} tokens/s")
    reason = FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_")
    parts.append(f"ended by {reason.replace('_', ' ').lower()}")
    return " · ".join(parts)


def seconds_of(duration: Duration) -> float:
    return duration.ToTimedelta().total_seconds()
