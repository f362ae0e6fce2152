"""What looking at attention costs a served stream.

Method: short answers after prompts that the prefix cache has, from the first token to the end of the stream. Every
other one is plain; those between are of each variant once in a round, in random order. A cost is a variant's time over
the geometric mean of the two plain ones beside it, less 1: whatever changes more slowly than within a second changes
all three. What is told is the mean without a fifth of the samples at either end, with a 95 % bootstrap interval; `plain
again` is a variant like the plain one: its cost is 0, and shows what the method resolves.

All requests go to one server that never looks by itself (`--attention-every 0`), so processes do not differ; one in 32
tokens of `spans` is observed, as is one in 32 gaps here, and the observed prompt row comes before the first token.
`server's look` goes to a second server that looks at every step: by default it is every 64th, so that a 64th of this,
difference between two processes and all, is what the default costs. The last line is one JSON document, with every
sample.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from interference import VOCABULARY, connect, server
from record import read_bandwidth, save

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1.generation_pb2_grpc import GenerationServiceStub
from pagestream.v1.stats_pb2 import Span, StatsLevel, StatsOptions

NEW_TOKENS = 33  # the 33rd comes from an observed row
FLAGS = ("--no-speculation", "--canary-interval", "0", "--kv-memory", "512MiB")
LOOK = "server's look"
DEFAULT_EVERY = 64  # --attention-every
TRIMMED = 0.2

Samples = dict[str, list[list[float]]]  # of each variant [before, its own, after], seconds


def variants(context: int) -> dict[str, StatsOptions | None]:
    quarter = context // 4
    spans = [Span(name=str(i), begin_token=i * quarter, end_token=(i + 1) * quarter) for i in range(4)]
    return {
        "plain again": None,
        "output": StatsOptions(level=StatsLevel.STATS_LEVEL_OUTPUT),
        "spans": StatsOptions(level=StatsLevel.STATS_LEVEL_SPANS, spans=spans),
        LOOK: None,
    }


async def answer(stub: GenerationServiceStub, prompt: Sequence[int], stats: StatsOptions | None) -> tuple[float, float]:
    """When its first token came, and its end."""
    request = pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=prompt),
        stop=pb.StopConfig(max_tokens=NEW_TOKENS, ignore_eos=True),
        output=pb.OutputConfig(token_ids=True),
        stats=stats,
    )
    times = [
        time.perf_counter()
        async for event in stub.GenerateStream(request)
        if event.HasField("delta") or event.HasField("finished")
    ]
    return times[0], times[-1]


async def take(
    stub: GenerationServiceStub, prompts: Sequence[Sequence[int]], stats: StatsOptions | None = None
) -> float:
    """Seconds from the first token of any stream to the end of all."""
    times = await asyncio.gather(*(answer(stub, prompt, stats) for prompt in prompts))
    return max(end for _, end in times) - min(first for first, _ in times)


async def measure(address: str, looking: str, context: int, streams: int, seconds: float) -> Samples:
    """As many rounds as fit."""
    asked = variants(context)
    prompts = [[random.randrange(VOCABULARY) for _ in range(context)] for _ in range(streams)]  # noqa: S311
    found: Samples = {name: [] for name in asked}
    async with connect(address) as plain, connect(looking) as looks:
        for stub in (plain, looks):  # fills the prefix caches
            await take(stub, prompts)
        before = await take(plain, prompts)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for name in random.sample(list(asked), len(asked)):
                own = await take(looks if name == LOOK else plain, prompts, asked[name])
                after = await take(plain, prompts)
                found[name].append([before, own, after])
                before = after
    return found


def cost(samples: npt.NDArray[np.float64]) -> dict[str, float]:
    """Of [N, 3], as the method says."""
    logarithms = np.log(samples)
    ratios = logarithms[:, 1] - (logarithms[:, 0] + logarithms[:, 2]) / 2
    drawn = np.random.default_rng(0).choice(ratios, (5000, len(ratios)))
    value, lower, upper = np.expm1([trimmed_mean(ratios), *np.quantile(trimmed_mean(drawn), (0.025, 0.975))])
    return {"value": float(value), "lower": float(lower), "upper": float(upper)}


def trimmed_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    cut = int(values.shape[-1] * TRIMMED)
    mean: npt.NDArray[np.float64] = np.sort(values)[..., cut : values.shape[-1] - cut].mean(axis=-1)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=210.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with (
        server(options.model, *FLAGS, "--attention-every", "0") as address,
        server(options.model, *FLAGS, "--attention-every", "1") as looking,
    ):
        found = asyncio.run(measure(address, looking, options.context, options.streams, options.seconds))
    samples = {name: np.array(each) for name, each in found.items()}
    costs = {name: cost(each) for name, each in samples.items()}
    costs["default"] = {side: value / DEFAULT_EVERY for side, value in costs[LOOK].items()}
    plain = float(np.median(np.concatenate([each[:, 2] for each in samples.values()])))
    result: dict[str, Any] = {
        "read_bandwidth_gb_s": read_bandwidth() / 1e9,
        "load_before": load,
        "context": options.context,
        "streams": options.streams,
        "rounds": len(found[LOOK]),
        "plain_ms_per_token": plain / (options.streams * (NEW_TOKENS - 1)) * 1e3,
        "cost": costs,
        "samples": found,
    }
    save(f"observe_cost-{options.context}x{options.streams}", result, options.out)


if __name__ == "__main__":
    main()
