"""Bucket counts in arrays: many observations in one call, which prometheus_client's own histograms do not offer."""

from __future__ import annotations

from collections.abc import Sequence
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
        self._edges = np.array(family.edges)
        self._counts = np.zeros((len(self.rows), len(family.edges) + 1), np.int64)  # per bucket, not cumulative
        self._sums = np.zeros(len(self.rows))

    def add(self, rows: npt.NDArray[np.intp] | int, values: Sequence[float] | float) -> None:
        """Adds observations; a value on an edge belongs to the bucket below it, as `le` says."""
        np.add.at(self._counts, (np.asarray(rows), np.searchsorted(self._edges, values, side="left")), 1)
        np.add.at(self._sums, rows, values)

    def read(self) -> HistogramReading:
        return HistogramReading(self._counts.cumsum(axis=1), self._sums.copy())
