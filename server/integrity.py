"""Watches where attention goes for what damage to keys and values looks like.

What cannot be is an event at once. What can be is compared with the model's own past, by context and layer group: the
logarithm of the sink's mass and the entropy, each in deviations from a mean that forgets slowly. A sink that is damaged
is lost to every layer that has one, while in some texts one third of the layers prefers another token: so it is lost if
the layer groups together are far off. Nothing is said before there are rows of several requests, and a row that is far
off moves the mean only as far as one at half the limit does, so that neither damage nor one odd text soon becomes the
norm. An event is counted and logged, never a failure of the request.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from pagestream.model.step import AttentionSummary, GroupSummary
from pagestream.server.metric_families import CONTEXT_EDGES, IntegrityKind
from pagestream.server.metrics import Metrics

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # nats, and shares: float32 sums over long contexts
LIMIT = 6.0  # deviations; server/README.md has the figures behind both
SINK_LIMIT = 5.5
MIN_ROWS, MIN_REQUESTS = 200, 8  # of a length before it is compared with
MIN_SINK = 0.1  # a group whose first tokens hold less has no sink to lose
_LEAST_ENTROPY_DEVIATION = 0.25  # nats
_LEAST_SINK_DEVIATION = 0.2  # of the logarithm
_MEMORY = 2000  # rows
_LOG_INTERVAL = 60.0  # seconds between two lines about one kind


class IntegrityMonitor:
    """Used by the engine's thread alone."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._past: defaultdict[int, _Past] = defaultdict(_Past)  # by octave of context
        self._silent_until: defaultdict[IntegrityKind, float] = defaultdict(lambda: -math.inf)

    def check(self, row: AttentionSummary, request_id: str) -> None:
        """Counts what is wrong with a row, one event of each kind; a row that cannot be teaches nothing."""
        if not all(map(math.isfinite, _numbers(row))):
            self.report("nan", request_id, f"attention over {row.context} tokens is not finite")
        elif (impossible := _impossible(row)) is not None:
            self.report("entropy_range", request_id, f"attention over {row.context} tokens: {impossible}")
        else:
            self._compare(row, request_id)

    def report(self, kind: IntegrityKind, request_id: str, finding: str) -> None:
        self._metrics.book([("integrity_events_total", 1, (kind,))])
        now = self._clock()
        if now >= self._silent_until[kind]:
            self._silent_until[kind] = now + _LOG_INTERVAL
            log.warning("integrity: %s, request %s: %s; more of the kind are only counted", kind, request_id, finding)

    def _compare(self, row: AttentionSummary, request_id: str) -> None:
        past = self._past[max(row.context, CONTEXT_EDGES[0]).bit_length()]
        if past.is_known:
            number, jump = past.entropy_jump(row.groups)
            if abs(jump) > LIMIT:
                finding = f"{jump:+.1f} deviations in layer group {number} at {row.context} tokens"
                self.report("entropy_jump", request_id, finding)
            if (lost := past.lost_sink(row.groups)) > SINK_LIMIT:
                finding = f"{lost:.1f} deviations over the layer groups at {row.context} tokens"
                self.report("sink_lost", request_id, finding)
        past.add(row.groups, request_id)


class _Past:
    """What is normal at one length, by layer group."""

    def __init__(self) -> None:
        self._rows = 0
        self._requests: set[str] = set()  # until there are enough
        self._entropies: defaultdict[int, _Normal] = defaultdict(lambda: _Normal(_LEAST_ENTROPY_DEVIATION))
        self._sinks: defaultdict[int, _Normal] = defaultdict(lambda: _Normal(_LEAST_SINK_DEVIATION))

    @property
    def is_known(self) -> bool:
        return self._rows >= MIN_ROWS and len(self._requests) >= MIN_REQUESTS

    def entropy_jump(self, groups: Sequence[GroupSummary]) -> tuple[int, float]:
        """The layer group that is farthest off, and its deviations."""
        jumps = [(number, self._entropies[number].deviations(group.entropy)) for number, group in enumerate(groups)]
        return max(jumps, key=lambda jump: abs(jump[1]))

    def lost_sink(self, groups: Sequence[GroupSummary]) -> float:
        """Deviations that sinks are short of, root of their mean square over the layer groups that have one."""
        deviations = [
            self._sinks[number].deviations(_log_sink(group))
            for number, group in enumerate(groups)
            if self._sinks[number].mean > math.log(MIN_SINK)
        ]
        squares = [min(each, 0.0) ** 2 for each in deviations]
        return math.sqrt(sum(squares) / len(squares)) if squares else 0.0

    def add(self, groups: Sequence[GroupSummary], request_id: str) -> None:
        self._rows += 1
        if len(self._requests) < MIN_REQUESTS:
            self._requests.add(request_id)
        for number, group in enumerate(groups):
            self._entropies[number].add(group.entropy)
            self._sinks[number].add(_log_sink(group))


class _Normal:
    """Mean and variance that forget."""

    def __init__(self, least_deviation: float) -> None:
        self._rows = 0
        self.mean = 0.0
        self._variance = 0.0
        self._least = least_deviation

    def deviations(self, value: float) -> float:
        return (value - self.mean) / max(math.sqrt(self._variance), self._least)

    def add(self, value: float) -> None:
        self._rows += 1
        if self._rows > MIN_ROWS:
            reach = LIMIT / 2 * max(math.sqrt(self._variance), self._least)
            value = min(max(value, self.mean - reach), self.mean + reach)
        weight = 1 / min(self._rows, _MEMORY)
        difference = value - self.mean
        self.mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)


def _log_sink(group: GroupSummary) -> float:
    return math.log(max(group.sink_mass, 1e-6))


def _numbers(row: AttentionSummary) -> Iterator[float]:
    for group, bands in zip(row.groups, row.bands, strict=True):
        yield from (group.entropy, group.entropy_min, group.entropy_max, group.entropy_rest)
        yield from (group.sink_mass, group.recent_mass, group.p_max, *bands)
    if row.pages is not None:
        yield from (row.pages.entropy, *row.pages.mass)


def _impossible(row: AttentionSummary) -> str | None:
    """What is wrong with numbers that are all finite."""
    most = math.log(row.context) + TOLERANCE
    for group, bands in zip(row.groups, row.bands, strict=True):
        for entropy in (group.entropy, group.entropy_min, group.entropy_max, group.entropy_rest):
            if not -TOLERANCE <= entropy <= most:
                return f"an entropy of {entropy:g} nats"
        for mass in (group.sink_mass, group.recent_mass, group.p_max, *bands):
            if not -TOLERANCE <= mass <= 1 + TOLERANCE:
                return f"a mass of {mass:g}"
        if abs(sum(bands) - 1) > TOLERANCE:
            return f"bands that sum to {sum(bands):g}"
    if row.pages is not None and abs(sum(row.pages.mass) - 1) > TOLERANCE:
        return f"pages that sum to {sum(row.pages.mass):g}"
    return None
