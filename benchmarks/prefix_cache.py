"""What the prefix cache saves a chat, and what it costs prompts that share nothing.

1. A chat of ten turns: of each turn the prompt's tokens, those computed and the time to first token, beside a server
   without the cache.
2. Rounds of prompts of random tokens, so 0 % hits, on a pool that they fill, so that pages are evicted: tokens per
   second (prompts and answers) with the cache and without, in turns, both servers up all the time.

Method: servers in processes of their own on the default model, times as a client sees them. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

from interference import connect, server, stream
from record import read_bandwidth, save

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub

FLAGS = ("--canary-interval", "0")
SMALL_POOL = ("--kv-memory", "96MB")  # 4,096 tokens: less than two rounds
TURN = "Turn {}: tell me one more thing about rivers, mountains or the sea, and say in which book I find it."
STREAMS, PROMPT_TOKENS, NEW_TOKENS = 8, 256, 32


async def chat(address: str, turns: int) -> list[dict[str, Any]]:
    messages: list[pb.ChatMessage] = []
    result = []
    async with connect(address) as stub:
        for number in range(turns):
            messages.append(pb.ChatMessage(role="user", content=TURN.format(number)))
            request = pb.GenerateStreamRequest(
                chat=pb.Chat(messages=messages), stop=pb.StopConfig(max_tokens=40, ignore_eos=True)
            )
            text, first = "", 0.0
            begun = time.perf_counter()
            async for event in stub.GenerateStream(request):
                if event.HasField("delta"):
                    first = first or time.perf_counter() - begun
                    text += event.delta.text
                usage = event.finished.usage
            messages.append(pb.ChatMessage(role="assistant", content=text))
            computed = usage.prompt_tokens - usage.cached_tokens
            result.append({"prompt_tokens": usage.prompt_tokens, "computed": computed, "ttft_ms": first * 1e3})
    return result


async def tokens_per_second(stub: GenerationServiceStub) -> float:
    begun = time.perf_counter()
    await asyncio.gather(*(stream(stub, PROMPT_TOKENS, NEW_TOKENS) for _ in range(STREAMS)))
    return STREAMS * (PROMPT_TOKENS + NEW_TOKENS) / (time.perf_counter() - begun)


async def rounds_in_turns(cached: str, plain: str, rounds: int) -> dict[str, Any]:
    async with connect(cached) as with_cache, connect(plain) as without:
        stubs = {"with": with_cache, "without": without}
        for stub in stubs.values():
            for _ in range(2):  # fills the pool
                await tokens_per_second(stub)
        measured: dict[str, list[float]] = {name: [] for name in stubs}
        for number in range(rounds):
            for name in sorted(stubs, reverse=bool(number % 2)):  # neither always goes first
                measured[name].append(await tokens_per_second(stubs[name]))
    ratios = [a / b for a, b in zip(measured["with"], measured["without"], strict=True)]
    return {"tokens_per_s": measured, "ratios": ratios, "median_ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    result: dict[str, Any] = {"read_bandwidth_gb_s": read_bandwidth() / 1e9}
    off = "--no-prefix-cache"
    with server("default", *FLAGS) as cached, server("default", *FLAGS, off) as plain:
        result["chat"] = {
            "with": asyncio.run(chat(cached, options.turns)),
            "without": asyncio.run(chat(plain, options.turns)),
        }
    with server("default", *FLAGS, *SMALL_POOL) as cached, server("default", *FLAGS, *SMALL_POOL, off) as plain:
        result["no_hits"] = asyncio.run(rounds_in_turns(cached, plain, options.rounds))
    save("prefix_cache", result, options.out)


if __name__ == "__main__":
    main()
