"""Seconds by length: one request at a time, new random prompts in random order, nothing in the prefix cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from pagestream.loadtest.degradation.fit import CostFit, fit_cost
from pagestream.loadtest.degradation.server import Server, Stream
from pagestream.loadtest.scrape import MetricsPage, total
from pagestream.loadtest.shapes import Vocabulary
from pagestream.loadtest.statistics import Array, Interval, bootstrap, median_of

NEW_TOKENS = 32
Progress = Callable[[Iterable[int], int, str], Iterable[int]]


@dataclass(frozen=True)
class LatencyPoint:
    tokens: int  # of the prompt
    rounds: int
    first_token: Interval  # seconds, median
    gap: Interval  # seconds a token after the first, median
    first_token_samples: list[float]  # of each round
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


class LatencyRounds:
    """A round asks each length once, in random order, after a prompt to warm up. Rounds may lie apart in time."""

    def __init__(
        self, server: Server, vocabulary: Vocabulary, lengths: Sequence[int], metrics: MetricsPage | None, seed: int
    ) -> None:
        self._server, self._vocabulary, self._lengths, self._metrics = server, vocabulary, lengths, metrics
        self._random = Random(f"{seed} latency")
        self._first: dict[int, list[float]] = {length: [] for length in lengths}
        self._gaps: dict[int, list[float]] = {length: [] for length in lengths}
        self._counts = np.zeros(2)  # of _scrape, in all rounds

    def round(self, progress: Progress) -> None:
        self._stream(max(self._lengths[0], self._lengths[-1] // 8))
        before = _scrape(self._metrics)
        order = self._random.sample(self._lengths, len(self._lengths))
        for length in progress(order, len(order), "latency"):
            stream = self._stream(length)
            self._first[length].append(stream.tokens[0])
            self._gaps[length].append((stream.tokens[-1] - stream.tokens[0]) / (len(stream.tokens) - 1))
        self._counts += _scrape(self._metrics) - before

    def result(self) -> Latency:
        first, gaps = list(self._first.values()), list(self._gaps.values())
        points = [
            LatencyPoint(length, len(seconds), bootstrap(seconds, median_of), bootstrap(each, median_of), seconds, each)
            for length, seconds, each in zip(self._lengths, first, gaps, strict=True)
        ]
        prefill = fit_cost(self._lengths, np.array(first), degree=2)
        decode = fit_cost([length + NEW_TOKENS // 2 for length in self._lengths], np.array(gaps), degree=1)
        if np.isnan(self._counts).any():
            return Latency(points, prefill, decode, None, None, None)
        contexts = sum(length + token for length in self._lengths for token in range(1, NEW_TOKENS)) * len(first[0])
        read, accepted = self._counts.tolist()
        return Latency(points, prefill, decode, *_bandwidth(decode, read, contexts), accepted)

    def _stream(self, length: int) -> Stream:
        return self._server.stream(self._vocabulary.draw(self._random, length), NEW_TOKENS)


def _scrape(page: MetricsPage | None) -> Array:
    """[2]: bytes that decode steps read, tokens that were guessed and accepted, since the server began; NaN if it does
    not tell."""
    try:
        series = page.read() if page else None
    except (OSError, ValueError):
        series = None
    if series is None:
        return np.full(2, math.nan)
    read = total(series, "pagestream_attention_kv_bytes_total", phase="decode")
    return np.array([read, total(series, "pagestream_speculated_tokens_total", result="accepted")])


def _bandwidth(decode: CostFit, read: float, contexts: int) -> tuple[float | None, Interval | None]:
    """Bytes that a token of context takes, by the server's count of what decode steps `read`, and these over b."""
    if read <= 0 or decode.b.lower <= 0:
        return None, None
    per_token = read / contexts
    return per_token, Interval(per_token / decode.b.value, per_token / decode.b.upper, per_token / decode.b.lower)
