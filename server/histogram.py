"""Bucket counts of many series, many observations in one call, which prometheus_client's own histograms do not offer.

Lists, not arrays: a step adds a few observations, and with cold caches one call of numpy costs more than all of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagestream.server.metric_families import Family


@dataclass(frozen=True, slots=True)
class HistogramReading:
    counts: npt.NDArray[np.int64]  # [series, edges + 1], cumulative
    sums: npt.NDArray[np.float64]  # [series]


class Histogram:
    """Counts and sums of one family: a row per series, in the order of Family.series. Not thread-safe."""

    def __init__(self, family: Family) -> None:
        self.rows = {labels: row for row, labels in enumerate(family.series)}
        self._edges = family.edges
        self._counts = [[0] * (len(family.edges) + 1) for _ in self.rows]  # per bucket, not cumulative
        self._sums = [0.0] * len(self.rows)

    def add(self, rows: Iterable[int], values: Iterable[float]) -> None:
        """Adds observations; a value on an edge belongs to the bucket below it, as `le` says."""
        for row, value in zip(rows, values, strict=True):
            self._counts[row][bisect_left(self._edges, value)] += 1
            self._sums[row] += value

    def read(self) -> HistogramReading:
        return HistogramReading(np.array(self._counts, np.int64).cumsum(axis=1), np.array(self._sums))
