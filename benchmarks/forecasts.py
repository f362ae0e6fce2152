"""What a loaded server foretells beside what comes to pass: Estimate, the forecast made at receipt, and RetryInfo.

Method: the server in its own process with room for eight prompts in its queue. Prompts are 256 to 1,024 random tokens,
answers 16. In each round some arrive at once, then Estimate is asked for one more, which is sent; when all have ended,
so many arrive at once that some are refused. `estimate` and `receipt` are times to first token over what was foretold:
by Estimate, as a client sees both, and at receipt, as each answer itself tells both. `retry_seconds_too_long` is what
the first refusal says to wait, whole seconds rounded up, less the time until the last of those that were taken on had
its first token: from 0 to 1 is right. The first two rounds teach the cost model and do not count. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status
from interference import VOCABULARY, server
from record import save, seconds_of_others

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub
from pagestream.v1.insight_pb2 import EstimateRequest
from pagestream.v1.insight_pb2_grpc import InsightServiceStub

FLAGS = ("--max-queue-requests", "8", "--canary-interval", "0")
WARM_UP = 2  # rounds
CROWD = 16  # prompts at once, twice what the queue holds


@dataclass
class Found:
    """Ratios of times to first token to forecasts, and seconds that refusals say too many."""

    estimate: list[float] = field(default_factory=list)
    receipt: list[float] = field(default_factory=list)
    retry: list[float] = field(default_factory=list)


class Client:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._generation, self._insight = GenerationServiceStub(channel), InsightServiceStub(channel)

    async def round(self) -> Found:
        found = Found()
        before = [asyncio.create_task(self._first_token(draw(), found)) for _ in range(random.randint(0, 7))]  # noqa: S311
        prompt = draw()
        estimate = await self._insight.Estimate(EstimateRequest(token_ids=prompt))
        sent = time.perf_counter()
        first = await self._first_token(prompt, found)
        if foretold := estimate.time_to_first_token.ToNanoseconds():
            found.estimate.append((first - sent) / foretold * 1e9)
        await asyncio.gather(*before)
        crowd = await asyncio.gather(*(self._first_token(draw(), found) for _ in range(CROWD)), return_exceptions=True)
        refused = [each for each in crowd if isinstance(each, Refused)]
        moment, told = min((each.moment, each.seconds) for each in refused)
        found.retry.append(told - (max(each for each in crowd if isinstance(each, float)) - moment))
        return found

    async def _first_token(self, prompt: pb.TokenIds, found: Found) -> float:
        """When it came."""
        stop, first = pb.StopConfig(max_tokens=16, ignore_eos=True), 0.0
        try:
            async for event in self._generation.GenerateStream(pb.GenerateStreamRequest(token_ids=prompt, stop=stop)):
                if not first and event.HasField("delta"):
                    first = time.perf_counter()
                timings = event.finished.timings
        except grpc.aio.AioRpcError as error:
            raise Refused(time.perf_counter(), seconds_to_wait(error)) from error
        if foretold := timings.predicted_time_to_first_token.ToNanoseconds():
            found.receipt.append(timings.time_to_first_token.ToNanoseconds() / foretold)
        return first


@dataclass
class Refused(Exception):  # noqa: N818 - not an error here
    moment: float
    seconds: float  # that it was told to wait


def draw() -> pb.TokenIds:
    return pb.TokenIds(ids=[random.randrange(VOCABULARY) for _ in range(random.randint(256, 1024))])  # noqa: S311


def seconds_to_wait(error: grpc.aio.AioRpcError) -> float:
    status, info = rpc_status.from_call(error), RetryInfo()
    if status is None or not any(detail.Unpack(info) for detail in status.details):
        raise error
    return float(info.retry_delay.ToTimedelta().total_seconds())


def describe(values: Sequence[float]) -> dict[str, float]:
    quantiles = dict(zip(("p10", "p50", "p90"), np.quantile(values, (0.1, 0.5, 0.9)).tolist(), strict=True))
    return {"count": len(values), **quantiles}


def ratios(values: Sequence[float]) -> dict[str, float]:
    close = sum(abs(value - 1) <= 0.25 for value in values) / len(values)
    return {**describe(values), "within_25_percent": close}


async def measure(address: str, seconds: float) -> dict[str, Any]:
    rounds: list[Found] = []
    async with grpc.aio.insecure_channel(address) as channel:
        client, until = Client(channel), time.monotonic() + seconds
        while time.monotonic() < until or len(rounds) <= WARM_UP:
            rounds.append(await client.round())
    counted = rounds[WARM_UP:]
    return {
        "rounds": len(counted),
        "estimate": ratios([value for each in counted for value in each.estimate]),
        "receipt": ratios([value for each in counted for value in each.receipt]),
        "retry_seconds_too_long": describe([value for each in counted for value in each.retry]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with server(options.model, *FLAGS) as address:
        others = seconds_of_others()
        result = asyncio.run(measure(address, options.seconds))
        result["processor_seconds_of_others"] = seconds_of_others() - others
    save("forecasts", result, options.out)


if __name__ == "__main__":
    main()
