"""What looking at attention costs a served stream.

Method: three servers of the default model side by side, that never look (`--attention-every 0`), that look as often as
by default (every 64th step), and at every step. Answers of 64 tokens after a prompt that the prefix cache has: the time
from the first token to the last, and the processor time that the server's threads took meanwhile. A round asks every
variant once, in random order: the three servers, and the one that never looks for answers whose request wants
statistics (timing; output; attention of every token; pages and four named spans of every 32nd), so that what disturbs a
round disturbs all of its variants. A cost is the median over rounds of a variant's time over the plain one's, less 1,
with a 95 % bootstrap interval over rounds. `plain again` is a variant like the plain one: its cost is 0, and shows what
the method resolves. A look at every 64th step costs a 64th of one at every step, which is the sharper number. Two
servers of one kind can differ by several percent for as long as they live, so what servers do by themselves needs
several starts, and beside it stands a 64th of what attention costs a request: the same look, in the server that never
looks by itself. `spans` includes what `output` costs; `spans beside output` is what pages and spans add to it. The last
line is one JSON document, with every sample: `--add RESULT` goes on from one, with new servers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from interference import VOCABULARY, connect, server_process
from record import environment, read_bandwidth, save

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub
from pagestream.v1.stats_pb2 import Span, StatsLevel, StatsOptions

NEW_TOKENS = 64
FLAGS = ("--no-speculation", "--canary-interval", "0", "--kv-memory", "512MiB")
SERVERS = {"never": "0", "default": "64", "every step": "1"}  # --attention-every
PLAIN = "plain"


@dataclass(frozen=True)
class Variant:
    server: str
    stats: StatsOptions | None = None


def variants(context: int) -> dict[str, Variant]:
    quarter = context // 4
    spans = [Span(name=str(i), begin_token=i * quarter, end_token=(i + 1) * quarter) for i in range(4)]
    return {
        PLAIN: Variant("never"),
        "plain again": Variant("never"),
        "default": Variant("default"),
        "every step": Variant("every step"),
        "timing": Variant("never", StatsOptions(level=StatsLevel.STATS_LEVEL_TIMING)),
        "output": Variant("never", StatsOptions(level=StatsLevel.STATS_LEVEL_OUTPUT)),
        "attention": Variant("never", StatsOptions(level=StatsLevel.STATS_LEVEL_ATTENTION)),
        "spans": Variant("never", StatsOptions(level=StatsLevel.STATS_LEVEL_SPANS, spans=spans)),
    }


@dataclass(frozen=True)
class Sample:
    wall: float  # seconds from the first token to the last
    processor: float  # seconds of all the server's threads


Rounds = dict[str, list[Sample]]  # of each variant, in the order of rounds


def processor_seconds(pid: int) -> float:
    """Of all threads that live, to the nanosecond."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


async def answer(stub: GenerationServiceStub, prompt: Sequence[int], stats: StatsOptions | None) -> tuple[float, float]:
    """When its first and its last token came."""
    request = pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=prompt),
        stop=pb.StopConfig(max_tokens=NEW_TOKENS, ignore_eos=True),
        output=pb.OutputConfig(token_ids=True),
        stats=stats,
    )
    times = [time.perf_counter() async for event in stub.GenerateStream(request) if event.delta.token_ids]
    return times[0], times[-1]


async def sample(stub: GenerationServiceStub, pid: int, prompts: Sequence[Sequence[int]], variant: Variant) -> Sample:
    before = processor_seconds(pid)
    times = await asyncio.gather(*(answer(stub, prompt, variant.stats) for prompt in prompts))
    seconds = max(last for _, last in times) - min(first for first, _ in times)
    return Sample(seconds, processor_seconds(pid) - before)


async def measure(servers: dict[str, tuple[str, int]], context: int, streams: int, seconds: float) -> Rounds:
    """As many as fit."""
    asked = variants(context)
    prompts = [[random.randrange(VOCABULARY) for _ in range(context)] for _ in range(streams)]  # noqa: S311
    found: Rounds = {name: [] for name in asked}
    async with contextlib.AsyncExitStack() as stack:
        stubs = {name: await stack.enter_async_context(connect(address)) for name, (address, _) in servers.items()}

        async def take(name: str) -> Sample:
            server = asked[name].server
            return await sample(stubs[server], servers[server][1], prompts, asked[name])

        for name in servers:  # fills the prefix caches
            await take({"never": PLAIN}.get(name, name))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for name in random.sample(list(asked), len(asked)):
                found[name].append(await take(name))
    return found


def cost(samples: Sequence[float], plain: Sequence[float]) -> dict[str, float]:
    """Median of paired ratios, less 1."""
    ratios = np.array(samples) / np.array(plain) - 1
    drawn = np.median(np.random.default_rng(0).choice(ratios, (5000, len(ratios))), axis=1)
    lower, upper = np.quantile(drawn, (0.025, 0.975))
    return {"value": float(np.median(ratios)), "lower": float(lower), "upper": float(upper)}


def summarize(found: Rounds, streams: int) -> dict[str, Any]:
    by_clock: dict[str, Any] = {}
    tokens = streams * (NEW_TOKENS - 1)
    for clock in ("wall", "processor"):
        values = {name: [getattr(each, clock) for each in samples] for name, samples in found.items()}
        costs = {name: cost(values[name], values[PLAIN]) for name in found if name != PLAIN}
        costs["spans beside output"] = cost(values["spans"], values["output"])
        for name in ("every step", "attention"):
            costs[f"64th of {name}"] = {side: value / 64 for side, value in costs[name].items()}
        by_clock[clock] = {"plain_ms_per_token": statistics.median(values[PLAIN]) / tokens * 1e3, "cost": costs}
    return by_clock


def read(path: Path, context: int, streams: int) -> tuple[Rounds, list[dict[str, Any]]]:
    """Rounds of an earlier result and the parts that they came in. Raises ValueError if it is of something else."""
    document = json.loads(path.read_text())
    if (document["context"], document["streams"]) != (context, streams):
        raise ValueError(f"{path} is of {document['context']} tokens and {document['streams']} streams")
    rounds = {name: [Sample(*each) for each in samples] for name, samples in document["samples"].items()}
    return rounds, document["parts"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--add", type=Path, metavar="RESULT", help="of the same prompts: its rounds count too")
    options = parser.parse_args()
    earlier, parts = read(options.add, options.context, options.streams) if options.add else ({}, [])
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(server_process(options.model, *FLAGS, "--attention-every", every))
            for name, every in SERVERS.items()
        }
        load = os.getloadavg()[0]
        found = asyncio.run(measure(servers, options.context, options.streams, options.seconds))
    part = {"commit": environment()["commit"], "rounds": len(found[PLAIN]), "load_before": load}
    found = {name: [*earlier.get(name, ()), *samples] for name, samples in found.items()}
    result: dict[str, Any] = {
        "read_bandwidth_gb_s": read_bandwidth() / 1e9,
        "context": options.context,
        "streams": options.streams,
        "rounds": len(found[PLAIN]),
        "parts": [*parts, part],
        **summarize(found, options.streams),
        "samples": {name: [astuple(sample) for sample in samples] for name, samples in found.items()},
    }
    save(f"observe_cost-{options.context}x{options.streams}", result, options.out)


if __name__ == "__main__":
    main()
