"""What one prompt costs those who are being answered: four short streams, and a prompt of each length among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from threading import Event, Semaphore

import numpy as np

from pagestream.loadtest.degradation.server import Server
from pagestream.loadtest.shapes import Vocabulary
from pagestream.loadtest.statistics import Interval, bootstrap, median_of

VICTIMS = 4
_PROMPT = 64  # tokens of a victim
_ALONE = 48  # tokens of each victim before the prompt comes, the first of which warm up
_WARM = 16
Progress = Callable[[Iterable[int], int, str], Iterable[int]]


@dataclass(frozen=True)
class Intrusion:
    """Seconds. The null beside each: of the same streams right before."""

    first_token: float  # of the prompt that came
    typical_gap: float  # of the victims alone, median
    worst_gap: float
    worst_gap_null: float
    p99_gap: float
    stall: float  # summed over victims: what gaps were longer than the typical one
    stall_null: float  # for as long as the prompt took


@dataclass(frozen=True)
class InterferencePoint:
    """Medians over rounds; seconds, as in Intrusion."""

    tokens: int  # of the prompt that came
    rounds: int
    first_token: Interval
    typical_gap: Interval
    worst_gap: Interval
    worst_gap_null: Interval
    p99_gap: Interval
    stall: Interval
    stall_null: Interval


@dataclass(frozen=True)
class Interference:
    victims: int
    points: list[InterferencePoint]


class InterferenceRounds:
    """A round has a prompt of each length come once, in random order. Rounds may lie apart in time."""

    def __init__(self, server: Server, vocabulary: Vocabulary, lengths: Sequence[int], seed: int) -> None:
        self._server, self._vocabulary, self._lengths = server, vocabulary, lengths
        self._random = Random(f"{seed} interference")
        self._seen: dict[int, list[Intrusion]] = {length: [] for length in lengths}

    def round(self, progress: Progress) -> None:
        order = self._random.sample(self._lengths, len(self._lengths))
        for length in progress(order, len(order), "interference"):
            victims = [self._vocabulary.draw(self._random, _PROMPT) for _ in range(VICTIMS)]
            self._seen[length].append(_intrude(self._server, victims, self._vocabulary.draw(self._random, length)))

    def result(self) -> Interference:
        names = [name for name in InterferencePoint.__dataclass_fields__ if name in Intrusion.__dataclass_fields__]
        points = [
            InterferencePoint(
                length,
                len(each),
                **{name: bootstrap([getattr(one, name) for one in each], median_of) for name in names},
            )
            for length, each in self._seen.items()
        ]
        return Interference(VICTIMS, points)


def _intrude(server: Server, victims: Sequence[Sequence[int]], prompt: Sequence[int]) -> Intrusion:
    done, begun = Event(), Semaphore(0)

    def decode(tokens: Sequence[int]) -> list[float]:
        stamps: list[float] = []

        def take(stamp: float) -> None:
            stamps.append(stamp)
            if len(stamps) == _ALONE:
                begun.release()

        try:
            server.decode_until(tokens, done, take)
        finally:
            if len(stamps) < _ALONE:
                begun.release()  # whoever waits meets the error instead
        return stamps

    with ThreadPoolExecutor(len(victims)) as pool:
        futures = [pool.submit(decode, tokens) for tokens in victims]
        for _ in victims:
            begun.acquire()
        try:
            stream = server.stream(prompt, 1)
        finally:
            done.set()
        stamps = [future.result() for future in futures]
    return judge(stamps, stream.begun, stream.begun + stream.tokens[0])


def judge(victims: Sequence[Sequence[float]], begin: float, end: float) -> Intrusion:
    """`victims` are the moments of each one's tokens; a prompt came at `begin`, its first token at `end`."""
    gaps = [(later, later - earlier) for stamps in victims for earlier, later in pairwise(stamps[_WARM:])]
    alone = np.array([gap for later, gap in gaps if later <= begin])
    beside = np.array([gap for later, gap in gaps if later > begin and later - gap < end])
    typical = float(np.median(alone))

    def stall(each: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        return float(np.maximum(each - typical, 0).sum())

    share = (end - begin) / (begin - min(stamps[_WARM] for stamps in victims))
    return Intrusion(
        first_token=end - begin,
        typical_gap=typical,
        worst_gap=float(beside.max()),
        worst_gap_null=float(alone.max()),
        p99_gap=float(np.quantile(beside, 0.99)),
        stall=stall(beside),
        stall_null=stall(alone) * share,
    )
