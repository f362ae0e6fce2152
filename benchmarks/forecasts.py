"""What a loaded server foretells beside what comes to pass: Estimate, the forecast made at receipt, and RetryInfo.

Method: the server in its own process with room for eight prompts in its queue, the clients in one event loop; half of
the time goes to the first part, a quarter to each of the others. Prompts are random tokens: 32 to 1,024, one in five
2,000 to 4,000; answers have 16 tokens. Ratios are of actual times to what was foretold.

1. `newcomer`: up to three streams decode, up to three prompts are being read, Estimate is asked for one more, which is
   sent then, and nobody comes later. One in four begins with what the server has read before. `estimate` is the
   time to first token as the client sees both, `receipt` as the answer itself tells both. Where only streams run,
   `stall` is what the streams' clients saw of gaps above their median before, and `stall_ledger` what the answer says
   that it caused, both over `stall_for_others`, where that is 20 ms or more.
2. `steady`: requests of four tenants come at random moments, so shorter ones that come later overtake, which no
   forecast knows. The time to first token as the answer tells it over what was foretold at receipt.
3. `retry_seconds_too_long`: sixteen prompts at once, of which some are refused. What the first refusal says to wait, in
   whole seconds and at least one, less the time until the last that was taken on had its first token.

The first three rounds teach the cost model and do not count. `foretold_from` is the number of the first request after
ready whose answer carried a forecast. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status
from interference import VOCABULARY, server
from record import save, seconds_of_others

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import stats_pb2
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub
from pagestream.v1.insight_pb2 import EstimateRequest
from pagestream.v1.insight_pb2_grpc import InsightServiceStub

FLAGS = ("--max-queue-requests", "8", "--canary-interval", "0")
WARM_UP = 3  # rounds
CROWD = 16  # prompts at once, twice what the queue holds
RATE = 0.8  # requests a second of the steady load
TENANTS = 4
LEAST_STALL = 0.02  # seconds
Found = dict[str, list[float]]


@dataclass
class Answer:
    sent: float
    tokens: list[float] = field(default_factory=list)  # when they came
    finished: pb.Finished = field(default_factory=pb.Finished)

    @property
    def over_forecast(self) -> list[float]:
        """Time to first token over what was foretold at receipt; none before there is a cost model."""
        timings = self.finished.timings
        foretold = timings.predicted_time_to_first_token.ToNanoseconds()
        return [timings.time_to_first_token.ToNanoseconds() / foretold] if foretold else []


@dataclass
class Refused(Exception):  # noqa: N818 - not an error here
    moment: float
    seconds: float  # that it was told to wait


class Client:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._generation, self._insight = GenerationServiceStub(channel), InsightServiceStub(channel)
        self._read: list[int] = []  # a prompt that the server has read

    async def newcomer(self) -> Found:
        async with self._streams(random.randint(0, 3)) as streams:  # noqa: S311 - not a secret
            others = [asyncio.create_task(self.ask(draw())) for _ in range(random.choice((0, 0, 1, 3)))]  # noqa: S311
            before = [gap for each in streams for gap in gaps(each, 0.0)]
            await asyncio.sleep(0.05)  # they have arrived
            prompt = draw()
            if random.random() < 0.25:  # noqa: S311
                prompt[:-32] = self._read[: len(prompt) - 32]
            estimate = await self._insight.Estimate(EstimateRequest(token_ids=pb.TokenIds(ids=prompt)))
            answer = await self.ask(prompt)
            await asyncio.gather(*others)
            self._read = prompt
            took = answer.tokens[0] - answer.sent
            found: Found = {"receipt": answer.over_forecast}
            if foretold := estimate.time_to_first_token.ToNanoseconds() / 1e9:
                found["estimate"] = [took / foretold]
            stall = estimate.stall_for_others.ToNanoseconds() / 1e9
            if not others and stall >= LEAST_STALL:
                beside = [gap for each in streams for gap in gaps(each, answer.sent, answer.tokens[0])]
                found["stall"] = [(sum(beside) - len(beside) * statistics.median(before)) / stall]
                found["stall_ledger"] = [answer.finished.stats.stall_caused.ToNanoseconds() / 1e9 / stall]
        return found

    async def steady(self, seconds: float) -> list[float]:
        until, calls = time.monotonic() + seconds, []
        while time.monotonic() < until:
            tenant = str(random.randrange(TENANTS))  # noqa: S311
            calls.append(asyncio.create_task(self.ask(draw(), tenant)))
            await asyncio.sleep(random.expovariate(RATE))
        return [ratio for answer in await asyncio.gather(*calls) for ratio in answer.over_forecast]

    async def crowd(self) -> float:
        calls = [self.ask(draw()) for _ in range(CROWD)]
        ends = await asyncio.gather(*calls, return_exceptions=True)
        refused = min((each for each in ends if isinstance(each, Refused)), key=lambda each: each.moment)
        last = max(each.tokens[0] for each in ends if isinstance(each, Answer))
        return refused.seconds - (last - refused.moment)

    @asynccontextmanager
    async def _streams(self, count: int) -> AsyncIterator[list[Answer]]:
        """So many that have decoded for half a second."""
        answers = [Answer(0.0) for _ in range(count)]
        calls = [asyncio.create_task(self.ask(tokens(64), new_tokens=4000, answer=each)) for each in answers]
        await asyncio.sleep(0.5 if count else 0.0)
        yield answers
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def ask(
        self, prompt: list[int], tenant: str = "", new_tokens: int = 16, answer: Answer | None = None
    ) -> Answer:
        request = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=prompt),
            stop=pb.StopConfig(max_tokens=new_tokens, ignore_eos=True),
            stats=stats_pb2.StatsOptions(level=stats_pb2.STATS_LEVEL_TIMING),
        )
        answer = answer or Answer(0.0)
        answer.sent = time.perf_counter()
        try:
            async for event in self._generation.GenerateStream(request, metadata=(("x-pagestream-tenant", tenant),)):
                if event.HasField("delta"):
                    answer.tokens.append(time.perf_counter())
                answer.finished = event.finished
        except grpc.aio.AioRpcError as error:
            raise Refused(time.perf_counter(), seconds_to_wait(error)) from error
        return answer


def tokens(count: int) -> list[int]:
    return [random.randrange(VOCABULARY) for _ in range(count)]  # noqa: S311


def draw() -> list[int]:
    return tokens(random.randint(32, 1024) if random.random() < 0.8 else random.randint(2000, 4000))  # noqa: S311


def gaps(answer: Answer, begin: float, end: float = float("inf")) -> list[float]:
    """Between tokens of which the later came in this interval."""
    return [later - earlier for earlier, later in pairwise(answer.tokens) if begin <= later <= end]


def seconds_to_wait(error: grpc.aio.AioRpcError) -> float:
    status, info = rpc_status.from_call(error), RetryInfo()
    if status is None or not any(detail.Unpack(info) for detail in status.details):
        raise error
    return float(info.retry_delay.ToTimedelta().total_seconds())


def describe(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"count": 0}
    quantiles = dict(zip(("p10", "p50", "p90"), np.quantile(values, (0.1, 0.5, 0.9)).tolist(), strict=True))
    return {"count": len(values), **quantiles}


def ratios(values: Sequence[float]) -> dict[str, float]:
    close = sum(abs(value - 1) <= 0.25 for value in values) / max(len(values), 1)
    return {**describe(values), "within_25_percent": close}


async def measure(address: str, seconds: float) -> dict[str, Any]:
    gc.freeze()  # a collection that looks through all that torch's import left stops this process for 0.1 s
    async with grpc.aio.insecure_channel(address) as channel:
        client, foretold_from = Client(channel), 1
        while not (await client.ask(draw())).over_forecast:
            foretold_from += 1
        for _ in range(WARM_UP):
            await client.newcomer()
        rounds, until = [await client.newcomer()], time.monotonic() + seconds / 2
        while time.monotonic() < until:
            rounds.append(await client.newcomer())
        steady = await client.steady(seconds / 4)
        retries, until = [await client.crowd()], time.monotonic() + seconds / 4
        while time.monotonic() < until:
            retries.append(await client.crowd())
    names = ("estimate", "receipt", "stall", "stall_ledger")
    return {
        "foretold_from": foretold_from,
        "newcomer": {name: ratios([value for each in rounds for value in each.get(name, ())]) for name in names},
        "steady": ratios(steady),
        "retry_seconds_too_long": describe(retries),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--seconds", type=float, default=65.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with server(options.model, *FLAGS) as address:
        others = seconds_of_others()
        result = asyncio.run(measure(address, options.seconds))
        result["processor_seconds_of_others"] = seconds_of_others() - others
    save("forecasts", result, options.out)


if __name__ == "__main__":
    main()
