"""Percentiles, intervals and the ten lengths that everything is told by."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

CONTEXT_EDGES = tuple(2**k for k in range(8, 17))  # tokens; upper edges, inclusive, as in the server's label ctx
CTX = (*map(str, CONTEXT_EDGES), "inf")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
Z95 = 1.959963984540054


def ctx_of(tokens: int) -> str:
    """The bucket of a length."""
    return CTX[bisect_left(CONTEXT_EDGES, tokens)]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    lower: float
    upper: float


def wilson(hits: int, trials: int) -> Interval:
    """Of a proportion: Wilson's score interval, which is never empty and never leaves 0 to 1. Raises ValueError for no
    trials."""
    if trials < 1:
        raise ValueError("no trials")
    share, z2 = hits / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def bootstrap(
    samples: Sequence[float] | Array, statistic: Callable[[Array], Array], *, rounds: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap. `statistic` maps samples [..., n] to values [...]; one sample gives an empty interval.
    Raises ValueError for none."""
    values = np.asarray(samples, float)
    if not values.size:
        raise ValueError("no samples")
    drawn = np.random.default_rng(seed).integers(0, len(values), (rounds, len(values)))
    lower, upper = np.quantile(statistic(values[drawn]), (0.025, 0.975))
    return Interval(float(statistic(values)), float(lower), float(upper))


def mean_of(values: Array) -> Array:
    return np.asarray(values.mean(-1))


def median_of(values: Array) -> Array:
    return np.asarray(np.median(values, -1))


def describe(samples: Sequence[float]) -> dict[str, float]:
    """Count, mean, maximum and the percentiles, linear between order statistics."""
    values = np.asarray(samples, float)
    quantiles = np.quantile(values, list(QUANTILES.values()))
    return {
        "count": len(values),
        "mean": float(values.mean()),
        **{name: float(value) for name, value in zip(QUANTILES, quantiles, strict=True)},
        "max": float(values.max()),
    }
