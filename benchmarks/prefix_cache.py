"""What the prefix cache saves a chat, and what it costs prompts that share nothing.

1. A chat of ten turns: of each turn the prompt's tokens, those computed and the time to first token, beside a server
   without the cache.
2. Rounds of prompts of random tokens, so 0 % hits, on a pool that they have filled, so that pages are evicted: tokens
   per second (prompts and answers) with the cache and without, in turns. Each round has servers of its own: two
   processes of the same settings differ by several per cent for as long as they live.

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

FLAGS = ("--canary-interval", "0")
OFF = "--no-prefix-cache"
SMALL_POOL = ("--kv-memory", "96MB")  # 4,096 tokens
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


async def tokens_per_second(address: str) -> float:
    async with connect(address) as stub:

        async def batch(prompt_tokens: int, new_tokens: int) -> None:
            await asyncio.gather(*(stream(stub, prompt_tokens, new_tokens) for _ in range(STREAMS)))

        await batch(2 * PROMPT_TOKENS, 1)  # fills the pool
        begun = time.perf_counter()
        await batch(PROMPT_TOKENS, NEW_TOKENS)
        return STREAMS * (PROMPT_TOKENS + NEW_TOKENS) / (time.perf_counter() - begun)


def no_hits(rounds: int) -> dict[str, Any]:
    settings: dict[str, tuple[str, ...]] = {"with": (), "without": (OFF,)}
    measured: dict[str, list[float]] = {name: [] for name in settings}
    for number in range(rounds):
        for name in sorted(settings, reverse=bool(number % 2)):  # neither always goes first
            with server("default", *FLAGS, *SMALL_POOL, *settings[name]) as address:
                measured[name].append(asyncio.run(tokens_per_second(address)))
        print(number, measured, flush=True)  # noqa: T201 - it takes minutes
    ratios = [a / b for a, b in zip(measured["with"], measured["without"], strict=True)]
    return {"tokens_per_s": measured, "ratios": ratios, "median_ratio": statistics.median(ratios)}


def chats(turns: int) -> dict[str, Any]:
    with server("default", *FLAGS) as cached, server("default", *FLAGS, OFF) as plain:
        return {"with": asyncio.run(chat(cached, turns)), "without": asyncio.run(chat(plain, turns))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", choices=("chat", "no_hits"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    bandwidth = read_bandwidth() / 1e9
    result = chats(options.turns) if options.scene == "chat" else no_hits(options.rounds)
    save(f"prefix_cache_{options.scene}", {"read_bandwidth_gb_s": bandwidth, **result}, options.out)


if __name__ == "__main__":
    main()
