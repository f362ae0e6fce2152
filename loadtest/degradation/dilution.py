"""Where attention goes as context grows: longer and longer beginnings of the same texts, and the rows after them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict

from pagestream.loadtest.degradation.server import NotReportedError, Server
from pagestream.loadtest.statistics import Array, Interval, bootstrap, mean_of
from pagestream.v1.stats_pb2 import LayerGroupStats, RequestStats

ROWS = 16  # decoded tokens that are observed after each prefix
_VALUES = ("entropy_nats", "entropy_rest_nats", "sink_mass", "recent_mass", "middle_mass", "p_max")


@dataclass(frozen=True)
class GroupPoint:
    """Means over the heads of a third of the layers, and over texts."""

    entropy_nats: Interval
    entropy_rest_nats: Interval  # without the first token
    effective_context_tokens: Interval  # exp of the mean entropy
    sink_mass: Interval
    recent_mass: Interval
    middle_mass: Interval
    p_max: Interval


@dataclass(frozen=True)
class DilutionPoint:
    tokens: int
    texts: int
    rows: int
    uniform_entropy_nats: float  # log n: attention without any preference
    gaussian_entropy_nats: float  # log n - 1/2: independent scores of variance 1, no structure either
    groups: dict[str, GroupPoint]
    band_mass: list[float]  # by octave of distance
    pages_for_95: Interval | None  # pages that hold 95 % of the mass, mean over heads; None of a server that says none


@dataclass(frozen=True)
class Dilution:
    points: list[DilutionPoint]
    exponents: dict[str, Interval]  # slope of entropy on log n by layer group: 0 is a fixed focus, 1 is uniform
    meta: dict[str, Any]  # how the server defines these numbers


def measure_dilution(
    server: Server,
    text: Sequence[int],
    lengths: Sequence[int],
    texts: int,
    progress: Callable[[Sequence[tuple[int, int]]], Iterable[tuple[int, int]]],
) -> Dilution:
    """Raises NotReportedError for a server that returns no attention statistics."""
    room = max(lengths)
    windows = [list(text[start * room : (start + 1) * room]) for start in range(min(texts, len(text) // room))]
    seen: dict[int, list[RequestStats]] = {length: [] for length in lengths}
    for window, length in progress([(window, length) for window in range(len(windows)) for length in lengths]):
        stats = server.stream(windows[window][:length], ROWS, attention=True).stats
        if stats is None or not stats.attention:
            raise NotReportedError("the server returned no attention statistics")
        seen[length].append(stats)
    names = [group.group for group in seen[lengths[0]][0].attention]
    points = [_point(length, seen[length], names) for length in lengths]
    exponents = {
        name: bootstrap(_slopes(lengths, [_values(seen[length], name, "entropy_nats") for length in lengths]), mean_of)
        for name in names
    }
    meta = MessageToDict(seen[lengths[0]][0].meta, preserving_proto_field_name=True)
    for varying in ("rows_observed", "rows_total"):
        meta.pop(varying, None)
    return Dilution(points, exponents, meta)


def _point(length: int, stats: Sequence[RequestStats], names: Sequence[str]) -> DilutionPoint:
    context = length + ROWS / 2
    groups = {}
    for name in names:
        values = {field: bootstrap(_values(stats, name, field), mean_of) for field in _VALUES}
        entropy = values["entropy_nats"]
        effective = Interval(*(math.exp(each) for each in (entropy.value, entropy.lower, entropy.upper)))
        groups[name] = GroupPoint(effective_context_tokens=effective, **values)
    pages = [each.pages_for_95 for each in stats if each.HasField("pages_for_95")]
    bands = np.array([each.band_mass for each in stats if each.band_mass])
    return DilutionPoint(
        tokens=length,
        texts=len(stats),
        rows=sum(each.meta.rows_observed for each in stats),
        uniform_entropy_nats=math.log(context),
        gaussian_entropy_nats=math.log(context) - 0.5,
        groups=groups,
        band_mass=[float(mass) for mass in bands.mean(0)] if bands.size else [],
        pages_for_95=bootstrap(np.array(pages), mean_of) if pages else None,
    )


def _values(stats: Sequence[RequestStats], group: str, field: str) -> Array:
    """[texts]."""

    def of(each: RequestStats) -> LayerGroupStats:
        return next(found for found in each.attention if found.group == group)

    return np.array([float(getattr(of(each), field)) for each in stats])


def _slopes(lengths: Sequence[int], entropies: Sequence[Array]) -> Array:
    """[texts]: of entropy on log n, least squares."""
    logs = np.log(np.array(lengths, float) + ROWS / 2)
    return np.asarray(np.polyfit(logs, np.stack(entropies), 1)[0])
