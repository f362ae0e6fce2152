"""What the prefix cache saves a chat, and what it costs prompts that share nothing.

1. A chat of ten turns: of each turn the prompt's tokens, those computed and the time to first token, beside a server
   without the cache.
2. Prompts of random tokens, so 0 % hits, on a pool that they have filled, so that pages are evicted. Two processes of
   the same settings differ by several per cent for as long as they live, so all is in one: a scheduler with the cache
   and one without take turns with one network, each prompt once with each, in an order drawn anew. Of every pair the
   time to a first token, and of every step the processor time of planning and committing it, beside what it took.

Method: the default model; the chat through servers in processes of their own, times as a client sees them. Intervals
are of 95 %, from 10,000 draws of the pairs with repetition. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from interference import VOCABULARY, connect, server
from record import read_bandwidth, save

from pagestream.model.checkpoint import open_checkpoint
from pagestream.model.default_model import resolve_model
from pagestream.model.loader import load_model
from pagestream.model.runner import Runner
from pagestream.model.step import SamplingParams
from pagestream.server.block_pool import BlockPool
from pagestream.server.config import default_cache_dir
from pagestream.server.request import Request
from pagestream.server.scheduler import Scheduler
from pagestream.v1 import generation_pb2 as pb

FLAGS = ("--canary-interval", "0")
OFF = "--no-prefix-cache"
PAGE_SIZE, POOL_BYTES = 32, 96_000_000  # 4,096 tokens
TURN = "Turn {}: tell me one more thing about rivers, mountains or the sea, and say in which book I find it."
PROMPT_TOKENS, NEW_TOKENS = 512, 8


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


@dataclass
class Costs:
    """Of one scheduler, in seconds."""

    first_tokens: list[float] = field(default_factory=list)
    prompt_planning: list[float] = field(default_factory=list)  # processor time, per step of a prompt
    decode_planning: list[float] = field(default_factory=list)
    prompt_steps: list[float] = field(default_factory=list)  # whole steps, of both
    decode_steps: list[float] = field(default_factory=list)


def run_request(scheduler: Scheduler, runner: Runner, prompt: list[int], costs: Costs) -> None:
    request = Request(f"{len(costs.first_tokens)}", prompt, SamplingParams(), NEW_TOKENS)
    begun = time.perf_counter()
    scheduler.admit(request)
    first = None
    while scheduler.has_work:
        started, processor = time.perf_counter(), time.thread_time()
        plan = scheduler.plan()
        planning = time.thread_time() - processor
        result = runner.step(plan)
        processor = time.thread_time()
        scheduler.commit(plan, result)
        planning += time.thread_time() - processor
        now = time.perf_counter()
        (costs.decode_planning if first else costs.prompt_planning).append(planning)
        (costs.decode_steps if first else costs.prompt_steps).append(now - started)
        first = first or now - begun
    costs.first_tokens.append(first or 0.0)


def no_hits(pairs: int) -> dict[str, Any]:
    chance = random.Random(1)  # noqa: S311 - not a secret
    path = resolve_model("default", default_cache_dir())
    loaded = load_model(
        open_checkpoint(path),
        dtype="auto",
        kv_dtype="auto",
        device="cpu",
        page_size=PAGE_SIZE,
        max_context=None,
        token_budget=PROMPT_TOKENS,
        kv_memory=POOL_BYTES,
        cache_dir=default_cache_dir(),
    )
    gc.freeze()  # as a server does before it is ready
    pages = loaded.plan.num_pages
    pools = {name: BlockPool(pages, PAGE_SIZE, prefix_cache=name == "with") for name in ("with", "without")}
    schedulers = {
        name: Scheduler(pool, token_budget=PROMPT_TOKENS, max_running=1, speculation=False)
        for name, pool in pools.items()
    }
    warm_up = 2 * pages * PAGE_SIZE // PROMPT_TOKENS  # the pool is full, and what it holds has been evicted once
    measured = {name: Costs() for name in schedulers}
    for number in range(warm_up + pairs):
        if number == warm_up:
            measured = {name: Costs() for name in schedulers}
        prompt = chance.choices(range(VOCABULARY), k=PROMPT_TOKENS)
        for name in chance.sample(list(schedulers), 2):
            run_request(schedulers[name], loaded.runner, prompt, measured[name])
    on, off = measured["with"], measured["without"]
    ratios = [a / b for a, b in zip(on.first_tokens, off.first_tokens, strict=True)]
    result: dict[str, Any] = {
        "pairs": pairs,
        "prompt_tokens": PROMPT_TOKENS,
        "evicted_pages": pools["with"].num_evictions_total,
        "hit_tokens": schedulers["with"].hit_tokens_total,
        "ttft_ratio": {"median": statistics.median(ratios), "interval95": interval(ratios, chance)},
    }
    for kind in ("prompt", "decode"):
        more = [a - b for a, b in zip(getattr(on, f"{kind}_planning"), getattr(off, f"{kind}_planning"), strict=True)]
        step = statistics.median(getattr(on, f"{kind}_steps") + getattr(off, f"{kind}_steps"))
        low, high = interval(more, chance)
        result[f"{kind}_step"] = {
            "ms": step * 1e3,
            "planning_us_without": statistics.median(getattr(off, f"{kind}_planning")) * 1e6,
            "more_us": {"median": statistics.median(more) * 1e6, "interval95": [low * 1e6, high * 1e6]},
            "share": {"median": statistics.median(more) / step, "interval95": [low / step, high / step]},
        }
    return result


def interval(values: list[float], chance: random.Random) -> list[float]:
    """Of the median."""
    medians = np.median(np.random.default_rng(chance.randrange(2**32)).choice(values, (10_000, len(values))), axis=1)
    return [float(quantile) for quantile in np.quantile(medians, (0.025, 0.975))]


def chats(turns: int) -> dict[str, Any]:
    with server("default", *FLAGS) as cached, server("default", *FLAGS, OFF) as plain:
        return {"with": asyncio.run(chat(cached, turns)), "without": asyncio.run(chat(plain, turns))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", choices=("chat", "no_hits"))
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    bandwidth = read_bandwidth() / 1e9
    result = chats(options.turns) if options.scene == "chat" else no_hits(options.pairs)
    save(f"prefix_cache_{options.scene}", {"read_bandwidth_gb_s": bandwidth, **result}, options.out)


if __name__ == "__main__":
    main()
