"""What a long prompt costs others, and others it: scenes against our own server on the default model.

1. A stream decodes; an 8,000-token prompt arrives; in its middle a 32-token prompt. The gaps of the stream before and
   meanwhile, the time to first token of both prompts, each also alone, for several targets.
2. Eight prompts of 64 and eight of 2,048 tokens at once: times to first token, and the total time beside that of the
   same prompts read one after the other.

Method: the server in its own process, all clients in one event loop, times as a client sees them. Prompts are random
token ids. `gap_beside_ms` has all gaps, `gap_beside_undisturbed_ms` those in which nobody else took processor time:
other processes, the kernel's own, or a hypervisor, which stops a processor for 0.1 s. The last line is a JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
from record import read_bandwidth, save, seconds_of_others

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub

VOCABULARY = 49_000  # a little less than the default model's
DISTURBED = 0.02  # seconds of other processes' time in a gap, which is known to a hundredth


@dataclass
class Call:
    """Moments at which tokens came, in seconds, and the processor time that others had had by then."""

    begun: float
    tokens: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def time_to_first_token(self) -> float:
        return self.tokens[0] - self.begun

    def gaps(self, begin: float = 0.0, end: float = float("inf"), most_taken: float = float("inf")) -> list[float]:
        """Between tokens of which the later came in this interval, and during which others took no more than that."""
        pairs = pairwise(zip(self.tokens, self.others, strict=True))
        return [
            later - earlier
            for (earlier, before), (later, after) in pairs
            if begin <= later <= end and after - before <= most_taken
        ]


@contextlib.contextmanager
def server(*flags: str) -> Iterator[str]:
    with server_process(*flags) as (address, _):
        yield address


@contextlib.contextmanager
def server_process(*flags: str) -> Iterator[tuple[str, int]]:
    """Its address and process id."""
    command = [sys.executable, "-m", "pagestream.server", "serve", "--grpc-port", "0", "--http-port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own server
    try:
        address = ""
        for line in process.stderr or ():
            if match := re.search(r"gRPC on (\S+:\d+)", line):
                address = match[1]
            if "ready:" in line:
                break
        else:
            raise RuntimeError(f"the server ended with {process.wait()}")
        yield address, process.pid
    finally:
        process.terminate()
        process.communicate()


async def stream(stub: GenerationServiceStub, prompt_tokens: int, new_tokens: int, call: Call | None = None) -> Call:
    ids = [random.randrange(VOCABULARY) for _ in range(prompt_tokens)]  # noqa: S311 - not a secret
    request = pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=ids),
        stop=pb.StopConfig(max_tokens=new_tokens, ignore_eos=True),
        output=pb.OutputConfig(token_ids=True),
    )
    call = call or Call(0.0)
    call.begun = time.perf_counter()
    async for event in stub.GenerateStream(request):
        call.tokens.extend([time.perf_counter()] * len(event.delta.token_ids))
        call.others.extend([seconds_of_others()] * len(event.delta.token_ids))
    return call


@contextlib.asynccontextmanager
async def connect(address: str) -> AsyncIterator[GenerationServiceStub]:
    gc.freeze()  # a collection that looks through all that torch's import left stops this process for 0.1 s
    async with grpc.aio.insecure_channel(address) as channel:
        yield GenerationServiceStub(channel)


async def one_stream_and_a_long_prompt(address: str, long_tokens: int) -> dict[str, Any]:
    async with connect(address) as stub:
        short_alone = statistics.median([(await stream(stub, 32, 1)).time_to_first_token for _ in range(5)])
        long_alone = (await stream(stub, long_tokens, 1)).time_to_first_token
        victim = Call(0.0)
        decoding = asyncio.create_task(stream(stub, 64, 100_000, victim))
        await asyncio.sleep(4)  # the stream alone
        others, long_begun = seconds_of_others(), time.perf_counter()
        reading = asyncio.create_task(stream(stub, long_tokens, 1))
        await asyncio.sleep(long_alone * 0.6)
        short = await stream(stub, 32, 1)
        long = await reading
        others = seconds_of_others() - others
        decoding.cancel()
        await asyncio.gather(decoding, return_exceptions=True)
    beside = victim.gaps(long_begun, long.tokens[0])
    share = others / (long.time_to_first_token * len(os.sched_getaffinity(0)))
    computed = long_tokens + 32 + len(beside)  # while the long prompt was read
    return {
        "processors_taken_by_others": max(share, 0.0),  # of the whole machine; above 0.02, try again
        "gap_alone_ms": _milliseconds(victim.gaps(end=long_begun)),
        "gap_beside_ms": _milliseconds(beside),
        "gap_beside_undisturbed_ms": _milliseconds(victim.gaps(long_begun, long.tokens[0], DISTURBED)),
        "long_ttft_s": {"alone": long_alone, "beside": long.time_to_first_token},
        "long_ttft_ratio": long.time_to_first_token / long_alone,
        "tokens_per_s": {"alone": long_tokens / long_alone, "beside": computed / long.time_to_first_token},
        "short_ttft_ms": {"alone": short_alone * 1e3, "in_the_middle": short.time_to_first_token * 1e3},
    }


async def short_and_long(address: str) -> dict[str, Any]:
    """Eight short and eight long prompts at once, in turn with the same in order of arrival."""
    lengths, rounds = [64, 2048] * 8, 3
    totals: dict[str, list[float]] = {"at_once": [], "in_order": []}
    calls: list[tuple[int, Call]] = []
    async with connect(address) as stub:
        for _ in range(rounds):
            begun = time.perf_counter()
            calls += zip(lengths, await asyncio.gather(*(stream(stub, length, 64) for length in lengths)), strict=True)
            totals["at_once"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            await _one_prompt_after_the_other(stub, lengths)
            totals["in_order"].append(time.perf_counter() - begun)
    medians = {order: statistics.median(seconds) for order, seconds in totals.items()}
    result = {"total_s": medians, "rounds": rounds, "at_once_over_in_order": medians["at_once"] / medians["in_order"]}
    for wanted in (64, 2048):
        times = [call.time_to_first_token for length, call in calls if length == wanted]
        result[f"ttft_s_{wanted}"] = {"median": statistics.median(times), "max": max(times)}
    return result


async def _one_prompt_after_the_other(stub: GenerationServiceStub, lengths: list[int]) -> None:
    """As a server reads them that keeps to the order of arrival: the next is sent when the last has its first token."""
    answers = []
    for length in lengths:
        call = Call(0.0)
        answers.append(asyncio.create_task(stream(stub, length, 64, call)))
        while not call.tokens:
            await asyncio.sleep(0.001)
    await asyncio.gather(*answers)


def _milliseconds(gaps: list[float]) -> dict[str, float]:
    ordered = sorted(gap * 1e3 for gap in gaps)
    if not ordered:
        return {}
    return {
        "p50": statistics.median(ordered),
        "p99": ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)],
        "max": ordered[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=float, nargs="+", default=[60.0], help="--target-gap-ms of the server")
    parser.add_argument("--long-tokens", type=int, default=8000)
    parser.add_argument("--model", default="default")
    parser.add_argument("--kv-dtype", default="auto", help="of the server; named in the result unless auto")
    parser.add_argument("--only-long", action="store_true", help="leave out the scene of sixteen at once")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    result: dict[str, Any] = {"read_bandwidth_gb_s": read_bandwidth() / 1e9, "targets": {}}
    for target in options.targets:
        with server(options.model, "--target-gap-ms", str(target), "--kv-dtype", options.kv_dtype) as address:
            scene = asyncio.run(one_stream_and_a_long_prompt(address, options.long_tokens))
            print(target, scene, flush=True)  # noqa: T201 - it takes minutes
            if not options.only_long:
                scene["sixteen_at_once"] = asyncio.run(short_and_long(address))
                print(target, scene["sixteen_at_once"], flush=True)  # noqa: T201
            result["targets"][target] = scene
    targets = "-".join(f"{target:g}" for target in options.targets)
    suffix = "" if options.kv_dtype == "auto" else f"-{options.kv_dtype}"
    save(f"interference-{targets}ms{suffix}", result, options.out)


if __name__ == "__main__":
    main()
