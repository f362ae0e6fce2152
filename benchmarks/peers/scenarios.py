"""What is measured: scenarios, their metrics, and the goal of each metric as a ratio to the best peer."""

from __future__ import annotations

import random
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from peers.fleet import Running
from peers.jobs import FailedError, Job
from peers.targets import Capacity

CONTEXTS = (128, 512, 2048, 4096, 8000)
NEW_TOKENS = 64
LARGEST_CONTEXT = 8192
TARGET_GAP = 0.060  # seconds: the default of `pagestream serve`

Prompt = Callable[[int], list[int]]  # tokens -> a prompt that was never used before
Measure = Callable[[Running, Prompt], Awaitable[dict[str, float]]]


@dataclass(frozen=True)
class Goal:
    """First the least, then the one to aim for: ratios to the best peer, or, `absolute`, values of our own."""

    first: float
    aim: float | None = None
    absolute: bool = False


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str
    goal: Goal | None = None
    more_is_better: bool = False


@dataclass(frozen=True)
class Scenario:
    name: str
    capacity: Capacity
    metrics: tuple[Metric, ...]
    measure: Measure
    fresh: bool = False  # the target is started anew for each measurement


async def _one_stream(context: int, running: Running, prompt: Prompt) -> dict[str, float]:
    (stream,) = await running.client.run([Job(prompt(context), NEW_TOKENS)])
    return {"TTFT": stream.time_to_first_token, "decode": stream.tokens_per_second}


async def _longest_stream(running: Running, prompt: Prompt) -> dict[str, float]:
    (short,) = await running.client.run([Job(prompt(CONTEXTS[0]), NEW_TOKENS)])
    measured = await _one_stream(CONTEXTS[-1], running, prompt)
    return {**measured, "time per token over that at 128": short.tokens_per_second / measured["decode"]}


async def _many_streams(count: int, running: Running, prompt: Prompt) -> dict[str, float]:
    streams = await running.client.run([Job(prompt(128), 128) for _ in range(count)])
    return {"total": count * 128 / max(stream.end for stream in streams)}


async def _short_and_long(running: Running, prompt: Prompt) -> dict[str, float]:
    streams = await running.client.run([Job(prompt(length), NEW_TOKENS) for length in (64, 2048) * 8])
    short = streams[::2]
    firsts = [stream.time_to_first_token for stream in short]
    return {
        "total time": max(stream.end for stream in streams),
        "short TTFT, median": statistics.median(firsts),
        "short TTFT, max": max(firsts),
        "short gap, p95": _percentile([gap for stream in short for gap in stream.gaps()], 0.95) * 1e3,
    }


async def _start(running: Running, prompt: Prompt) -> dict[str, float]:
    await running.client.run([Job(prompt(8000), NEW_TOKENS)])
    return {"start to ready": running.ready_s, "peak memory": running.process.peak_memory() / 1e6}


async def _long_prompt_arrives(running: Running, prompt: Prompt) -> dict[str, float]:
    (undisturbed,) = await running.client.run([Job(prompt(64), NEW_TOKENS)])
    (alone,) = await running.client.run([Job(prompt(8000), 1)])
    (short_alone,) = await running.client.run([Job(prompt(32), 1)])
    arrival = undisturbed.end  # the victim decodes by then
    middle = arrival + alone.time_to_first_token / 2
    victim, long, short = await running.client.run(
        [
            Job(prompt(64), LARGEST_CONTEXT - 128, background=True),
            Job(prompt(8000), 1, at=arrival),
            Job(prompt(32), 1, at=middle),
        ]
    )
    if long.end < middle:
        raise FailedError("the long prompt was done before its middle: something else slowed it down when it was alone")
    gap = _percentile(victim.gaps(arrival, long.end) or [long.time_to_first_token], 0.99)
    step = 1 / undisturbed.tokens_per_second
    short_limit = 2 * TARGET_GAP + short_alone.time_to_first_token
    return {
        "victim's gap, p99": gap * 1e3,
        "the same over target gap + a step": gap / (TARGET_GAP + step),
        "long TTFT alone": alone.time_to_first_token,
        "long TTFT": long.time_to_first_token,
        "long TTFT over alone": long.time_to_first_token / alone.time_to_first_token,
        "short TTFT alone": short_alone.time_to_first_token * 1e3,
        "short TTFT in the middle": short.time_to_first_token * 1e3,
        "the same over 2 target gaps + alone": short.time_to_first_token / short_limit,
    }


def _percentile(values: list[float], rank: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * rank), len(ordered) - 1)]


_DECODE_GOALS = {128: Goal(1.3, 1.8)} | dict.fromkeys((2048, 4096, 8000), Goal(1.7, 2.5))
_TTFT_GOALS = {512: Goal(0.9, 0.65), 2048: Goal(0.9, 0.65), 8000: Goal(0.8, 0.6)}


def _stream_scenario(context: int) -> Scenario:
    metrics = (
        Metric("TTFT", "s", _TTFT_GOALS.get(context)),
        Metric("decode", "tokens/s", _DECODE_GOALS.get(context), more_is_better=True),
    )
    name, capacity = f"stream-{context}", Capacity(1, LARGEST_CONTEXT)
    if context < CONTEXTS[-1]:
        return Scenario(name, capacity, metrics, partial(_one_stream, context))
    slope = Metric("time per token over that at 128", "", Goal(2.2, absolute=True))
    return Scenario(name, capacity, (*metrics, slope), _longest_stream)


def _streams_scenario(count: int) -> Scenario:
    metrics = (Metric("total", "tokens/s", Goal(1.3, 2.0), more_is_better=True),)
    return Scenario(f"streams-{count}", Capacity(count, 512), metrics, partial(_many_streams, count))


_MIXED = Scenario(
    "mixed",
    Capacity(16, 2304),
    (
        Metric("total time", "s", Goal(0.8, 0.6)),
        Metric("short TTFT, median", "s", Goal(0.2, 0.08)),
        Metric("short TTFT, max", "s", Goal(0.2, 0.08)),
        Metric("short gap, p95", "ms", Goal(0.7, 0.4)),
    ),
    _short_and_long,
)
_START = Scenario(
    "start",
    Capacity(1, LARGEST_CONTEXT),
    (
        Metric("start to ready", "s", Goal(4.0, 1.5, absolute=True)),
        Metric("peak memory", "MB", Goal(500.0, 350.0, absolute=True)),
    ),
    _start,
    fresh=True,
)
_LONG_PROMPT = Scenario(
    "long-prompt",
    Capacity(3, LARGEST_CONTEXT),
    (
        Metric("victim's gap, p99", "ms"),
        Metric("the same over target gap + a step", "", Goal(1.0, absolute=True)),
        Metric("long TTFT alone", "s"),
        Metric("long TTFT", "s"),
        Metric("long TTFT over alone", "", Goal(1.4, absolute=True)),
        Metric("short TTFT alone", "ms"),
        Metric("short TTFT in the middle", "ms"),
        Metric("the same over 2 target gaps + alone", "", Goal(1.0, absolute=True)),
    ),
    _long_prompt_arrives,
)

_ALL = (*map(_stream_scenario, CONTEXTS), *map(_streams_scenario, (4, 8, 32)), _MIXED, _START, _LONG_PROMPT)
SCENARIOS = {scenario.name: scenario for scenario in _ALL}


def prompts(seed: str) -> Prompt:
    """Random token ids; the same seed gives everyone the same."""
    generator = random.Random(seed)  # noqa: S311 - a fixed workload
    return lambda tokens: [generator.randrange(1000, 40_000) for _ in range(tokens)]
