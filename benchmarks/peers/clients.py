"""Clients of the three kinds of target: our gRPC service, HTTP servers that stream JSON, and workers on a pipe."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import grpc

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub
from peers.jobs import FailedError, Job, Stream, checked


class StreamingClient(ABC):
    """One call for each job, all in this event loop."""

    @abstractmethod
    def tokens(self, job: Job) -> AsyncGenerator[int, None]:
        """How many tokens came, each time some did."""

    async def run(self, jobs: Sequence[Job]) -> list[Stream]:
        begun = time.perf_counter()
        moments: list[list[float]] = [[] for _ in jobs]

        async def call(job: Job, stamps: list[float]) -> None:
            await asyncio.sleep(begun + job.at - time.perf_counter())
            async with aclosing(self.tokens(job)) as events:
                async for count in events:
                    stamps.extend([time.perf_counter() - begun] * count)

        tasks = [asyncio.create_task(call(job, stamps)) for job, stamps in zip(jobs, moments, strict=True)]
        try:
            await asyncio.gather(*(task for task, job in zip(tasks, jobs, strict=True) if not job.background))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return checked(jobs, moments)

    async def close(self) -> None:  # noqa: B027 - most hold nothing
        pass


class GrpcClient(StreamingClient):
    """Of our own service."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
        self._stub = GenerationServiceStub(self._channel)

    async def tokens(self, job: Job) -> AsyncGenerator[int, None]:
        request = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=job.prompt),
            stop=pb.StopConfig(max_tokens=job.new_tokens, ignore_eos=True),
            output=pb.OutputConfig(token_ids=True),
        )
        async for event in self._stub.GenerateStream(request):
            if event.delta.token_ids:
                yield len(event.delta.token_ids)

    async def close(self) -> None:
        await self._channel.close()


class HttpClient(StreamingClient):
    """Of a server on this machine that answers a POST with lines `data: JSON`."""

    path: str

    def __init__(self, port: int) -> None:
        self._port = port

    @abstractmethod
    def body(self, job: Job) -> dict[str, Any]: ...

    @abstractmethod
    def count(self, event: dict[str, Any], so_far: int) -> int:
        """Tokens that this event brings."""

    async def tokens(self, job: Job) -> AsyncGenerator[int, None]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            body = json.dumps(self.body(job)).encode()
            head = f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + body)
            status = await reader.readline()
            if b" 200" not in status:
                raise FailedError((status + await reader.read(1000)).decode(errors="replace"))
            so_far = 0
            async for line in reader:
                if line.startswith(b"data:") and b"[DONE]" not in line:
                    count = self.count(json.loads(line[5:]), so_far)
                    so_far += count
                    yield count
        finally:
            writer.close()


class LlamaCppClient(HttpClient):
    path = "/completion"

    def body(self, job: Job) -> dict[str, Any]:
        greedy = {"samplers": ["top_k"], "top_k": 1, "temperature": 0, "ignore_eos": True}
        rest = {"stream": True, "return_tokens": True, "cache_prompt": False}
        return {"prompt": job.prompt, "n_predict": job.new_tokens, **greedy, **rest}

    def count(self, event: dict[str, Any], so_far: int) -> int:
        if event.get("stop"):  # tokens inside an unfinished character are sent by nobody: they are counted here
            return int(event["tokens_predicted"]) - so_far
        return len(event.get("tokens") or ())


class VllmClient(HttpClient):
    path = "/v1/completions"

    def body(self, job: Job) -> dict[str, Any]:
        greedy = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return {"model": "m", "prompt": job.prompt, "max_tokens": job.new_tokens, "stream": True, **greedy}

    def count(self, event: dict[str, Any], so_far: int) -> int:  # noqa: ARG002 - every token comes with its id
        return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))


class WorkerClient:
    """Of a library without a server: a worker process that takes a list of jobs a line and answers with the moments."""

    def __init__(self, to: asyncio.StreamWriter, from_: asyncio.StreamReader) -> None:
        self._to, self._from = to, from_

    async def run(self, jobs: Sequence[Job]) -> list[Stream]:
        self._to.write(json.dumps([asdict(job) for job in jobs]).encode() + b"\n")
        line = await self._from.readline()
        if not line:
            raise FailedError("the worker died")
        answer = json.loads(line)
        if "error" in answer:
            raise FailedError(answer["error"])
        return checked(jobs, answer["moments"])

    async def close(self) -> None:
        self._to.close()
