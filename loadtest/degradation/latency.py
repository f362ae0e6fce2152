"""Seconds by length: one request at a time, new random prompts in random order, nothing in the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from pagestream.loadtest.degradation.fit import CostFit, fit_cost
from pagestream.loadtest.degradation.server import Server
from pagestream.loadtest.scrape import MetricsPage, Series, total
from pagestream.loadtest.shapes import Vocabulary
from pagestream.loadtest.statistics import Interval, bootstrap, median_of

NEW_TOKENS = 32
Progress = Callable[[Iterable[int], int, str], Iterable[int]]


@dataclass(frozen=True)
class LatencyPoint:
    tokens: int  # of the prompt
    repeats: int
    first_token: Interval  # seconds, median
    gap: Interval  # seconds a token after the first, median
    first_token_samples: list[float]
    gap_samples: list[float]  # the mean gap of each request: tokens that arrive together have no gap of their own


@dataclass(frozen=True)
class Latency:
    points: list[LatencyPoint]
    prefill: CostFit  # of the time to the first token by prompt
    decode: CostFit  # of the gap by context: a + b n
    kv_bytes_per_token: float | None
    kv_bytes_per_second: Interval | None  # read while decoding: bytes per token of context over b
    speculated_tokens: float | None  # that were accepted meanwhile; they shorten gaps


def lengths_up_to(longest: int, *, per_octave: int) -> list[int]:
    """From 64 tokens on, in equal ratios; the last is the longest itself."""
    steps = (round(64 * 2 ** (step / per_octave)) for step in range(8 * 20))
    inside = [length for length in steps if length < longest * 0.9]
    return [*dict.fromkeys(inside), longest]


def measure_latency(
    server: Server,
    vocabulary: Vocabulary,
    lengths: list[int],
    repeats: int,
    metrics: MetricsPage | None,
    seed: int,
    progress: Progress,
) -> Latency:
    """Each length `repeats` times, all in random order, after one of each to warm up."""
    before = _scrape(metrics)
    random = Random(f"{seed} latency")
    order = [length for length in lengths for _ in range(repeats)]
    random.shuffle(order)
    first: dict[int, list[float]] = {length: [] for length in lengths}
    gaps: dict[int, list[float]] = {length: [] for length in lengths}
    for length in progress([max(lengths[0], lengths[-1] // 8), *order], len(order) + 1, "latency"):
        stream = server.stream(vocabulary.draw(random, length), NEW_TOKENS)
        if length in first:
            first[length].append(stream.tokens[0])
            gaps[length].append((stream.tokens[-1] - stream.tokens[0]) / (len(stream.tokens) - 1))
    after = _scrape(metrics)
    points = [
        LatencyPoint(
            length,
            len(first[length]),
            bootstrap(first[length], median_of),
            bootstrap(gaps[length], median_of),
            first[length],
            gaps[length],
        )
        for length in lengths
    ]
    contexts = [length + NEW_TOKENS // 2 for length in lengths]
    decode = fit_cost(contexts, list(gaps.values()), degree=1)
    per_token, rate = _bandwidth(decode, order, before, after)
    prefill = fit_cost(lengths, list(first.values()), degree=2)
    return Latency(points, prefill, decode, per_token, rate, _speculated(before, after))


def _scrape(page: MetricsPage | None) -> Series | None:
    try:
        return page.read() if page else None
    except (OSError, ValueError):
        return None


def _speculated(before: Series | None, after: Series | None) -> float | None:
    name = "pagestream_speculated_tokens_total"
    return (
        None
        if before is None or after is None
        else total(after, name, result="accepted") - total(before, name, result="accepted")
    )


def _bandwidth(
    decode: CostFit, prompts: list[int], before: Series | None, after: Series | None
) -> tuple[float | None, Interval | None]:
    """Bytes that a token of context takes, by the server's count of what decode steps read, over b."""
    if before is None or after is None:
        return None, None
    name = "pagestream_attention_kv_bytes_total"
    read = total(after, name, phase="decode") - total(before, name, phase="decode")
    contexts = sum(length + token for length in prompts for token in range(1, NEW_TOKENS))
    if read <= 0 or decode.b.lower <= 0:
        return None, None
    per_token = read / contexts
    return per_token, Interval(per_token / decode.b.value, per_token / decode.b.upper, per_token / decode.b.lower)
