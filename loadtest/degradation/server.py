"""The server whose card is drawn, one call at a time: what the measurements ask of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.json_format import MessageToDict

from pagestream.loadtest.credentials import ANONYMOUS, Credentials
from pagestream.loadtest.target import TargetError
from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import insight_pb2, model_pb2, tokenizer_pb2
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub
from pagestream.v1.insight_pb2_grpc import InsightServiceStub
from pagestream.v1.model_pb2_grpc import ModelServiceStub
from pagestream.v1.stats_pb2 import RequestStats, StatsLevel, StatsOptions
from pagestream.v1.tokenizer_pb2_grpc import TokenizerServiceStub

T = TypeVar("T")
_CALL_SECONDS = 300.0
_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1))


class NotReportedError(Exception):
    """The server has no such statistics or service; the rest can be measured."""


@dataclass(frozen=True)
class Stream:
    """A streamed answer: seconds from sending to each token, and what the server says of it."""

    begun: float  # when it was sent, by time.perf_counter
    tokens: list[float]
    stats: RequestStats | None
    cached_tokens: int


@dataclass(frozen=True)
class Score:
    """Of each token of a given answer."""

    logprobs: list[float]
    greedy: list[bool]


class Server:
    """One connection. Methods raise TargetError with a sentence for the user."""

    def __init__(self, address: str, credentials: Credentials = ANONYMOUS) -> None:
        self._address = address
        self._metadata = credentials.headers
        try:
            tls = credentials.for_grpc()
        except OSError as error:
            raise TargetError(str(error)) from error
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, tls, options=_OPTIONS)
        self._generation = GenerationServiceStub(self._channel)
        self._insight = InsightServiceStub(self._channel)
        self._tokenizer = TokenizerServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def model(self) -> dict[str, Any]:
        """ModelInfo as plain data."""
        response = self._call(
            lambda: ModelServiceStub(self._channel).GetModel(
                model_pb2.GetModelRequest(), timeout=_CALL_SECONDS, metadata=self._metadata
            )
        )
        info = MessageToDict(
            response.model, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return {**info, "parameters": int(info["parameters"])}

    def encode(self, text: str) -> list[int]:
        """Without the tokens that the model puts around a text."""
        request = tokenizer_pb2.EncodeRequest(text=text, special_tokens=False)
        return list(
            self._call(
                lambda: self._tokenizer.Encode(request, timeout=_CALL_SECONDS, metadata=self._metadata)
            ).token_ids
        )

    def decode(self, tokens: Sequence[int]) -> str:
        request = tokenizer_pb2.DecodeRequest(token_ids=tokens, special_tokens=True)
        return self._call(lambda: self._tokenizer.Decode(request, timeout=_CALL_SECONDS, metadata=self._metadata)).text

    def score(self, prompt: Sequence[int], answer: Sequence[int]) -> Score:
        """Teacher-forced. Raises NotReportedError for a server without InsightService."""
        request = insight_pb2.ScoreRequest(token_ids=pb.TokenIds(ids=prompt), answer_token_ids=answer)
        response = self._call(lambda: self._insight.Score(request, timeout=_CALL_SECONDS, metadata=self._metadata))
        return Score(list(response.logprobs), list(response.greedy))

    def stream(self, prompt: Sequence[int], new_tokens: int, *, attention: bool = False) -> Stream:
        """Greedy, past the end of sequence."""
        request = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=prompt),
            stop=pb.StopConfig(max_tokens=new_tokens, ignore_eos=True),
            output=pb.OutputConfig(token_ids=True),
            stats=StatsOptions(level=StatsLevel.STATS_LEVEL_SPANS, attention_every=1) if attention else None,
        )
        return self._call(lambda: self._read(request))

    def decode_until(self, prompt: Sequence[int], done: Event, took: Callable[[float], None]) -> None:
        """Tells the moment, by time.perf_counter, of each token until `done` is set or there is no more room."""
        request = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=prompt),
            stop=pb.StopConfig(ignore_eos=True),
            output=pb.OutputConfig(token_ids=True),
        )

        def read() -> None:
            call = self._generation.GenerateStream(request, timeout=_CALL_SECONDS, metadata=self._metadata)
            for event in call:
                for _ in event.delta.token_ids:
                    took(time.perf_counter())
                if done.is_set():
                    call.cancel()
                    return

        self._call(read)

    def _read(self, request: pb.GenerateStreamRequest) -> Stream:
        tokens: list[float] = []
        finished = pb.Finished()
        sent = time.perf_counter()
        for event in self._generation.GenerateStream(request, timeout=_CALL_SECONDS, metadata=self._metadata):
            if event.HasField("delta"):
                tokens += [time.perf_counter() - sent] * len(event.delta.token_ids)
            elif event.HasField("finished"):
                finished = event.finished
        return Stream(
            sent, tokens, finished.stats if finished.HasField("stats") else None, finished.usage.cached_tokens
        )

    def _call(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise NotReportedError(error.details()) from error
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise TargetError(f"no pagestream server answers at {self._address} ({error.details()})") from error
            raise TargetError(f"{error.code().name}: {error.details()}") from error
