"""What a length costs: a + b n + c n^2 through medians, with intervals, and whether the square is really there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pagestream.loadtest.statistics import Array, Interval

_DRAWS = 500
_FEWEST_FOR_AICC = 6  # lengths: its correction divides by their number less 5


@dataclass(frozen=True)
class CostFit:
    """seconds = a + b n (+ c n^2). Intervals are of a bootstrap over rounds."""

    a: Interval
    b: Interval
    c: Interval | None  # of a line: none
    crossover: Interval | None  # n* = b / c tokens, where the square costs as much as the line; none if c can be 0
    aicc_gain: float | None  # AICc of the line less the parabola's: above 0 the square is worth its parameter
    quadratic: bool  # may be claimed
    worst_residual: float  # share of the median
    longest: int  # tokens; nothing is said beyond


def fit_cost(lengths: Sequence[int], samples: Array, *, degree: int, seed: int = 0) -> CostFit:
    """Weighted non-negative least squares on the medians, weights 1 / seconds^2, so that every length counts alike.

    `samples` [lengths, rounds] in seconds. Whole rounds are drawn again: a machine that is slow for a while is slow at
    every length, which divides out of n*. "Quadratic" is claimed only if the interval of c excludes 0, AICc prefers the
    parabola, and the longest length is beyond a quarter of n*.
    """
    n = np.asarray(lengths, float)
    design = np.stack([n**power for power in range(degree + 1)], axis=1)
    medians = np.median(samples, axis=1)
    estimate = nonnegative_fit(design, medians)
    again = np.random.default_rng(seed).integers(0, samples.shape[1], (_DRAWS, samples.shape[1]))
    drawn = np.array([nonnegative_fit(design, np.median(samples[:, rounds], axis=1)) for rounds in again])
    terms = [_interval(estimate[power], drawn[:, power]) for power in range(degree + 1)]
    residuals = np.abs(design @ estimate / medians - 1)
    square = terms[2] if degree == 2 else None
    crossover, gain, quadratic = None, None, False
    if square is not None:
        if len(lengths) >= _FEWEST_FOR_AICC:
            gain = _aicc(design[:, :2], medians) - _aicc(design, medians)
        if square.lower > 0:
            curved = drawn[drawn[:, 2] > 0]  # all but a few: the interval's lower end is above 0
            crossover = _interval(estimate[1] / estimate[2], curved[:, 1] / curved[:, 2])
            quadratic = gain is not None and gain > 0 and max(lengths) > crossover.value / 4
    return CostFit(terms[0], terms[1], square, crossover, gain, quadratic, float(residuals.max()), max(lengths))


def nonnegative_fit(design: Array, values: Array) -> Array:
    """Coefficients [k] >= 0 of design [m, k] that minimise the sum of squared relative errors: the best of the
    unconstrained fits on every subset of columns whose coefficients come out non-negative."""
    weighted = design / values[:, None]
    best, best_error = np.zeros(design.shape[1]), math.inf
    columns = range(design.shape[1])
    for chosen in itertools.chain.from_iterable(itertools.combinations(columns, k + 1) for k in columns):
        part = weighted[:, chosen]
        scale = np.abs(part).max(axis=0)  # n and n^2 differ by orders of magnitude
        solution = np.linalg.lstsq(part / scale, np.ones(len(values)), rcond=None)[0] / scale
        error = float(((part @ solution - 1) ** 2).sum())
        if (solution >= 0).all() and error < best_error:
            best, best_error = np.zeros(design.shape[1]), error
            best[list(chosen)] = solution
    return best


def _aicc(design: Array, values: Array) -> float:
    """Corrected Akaike criterion of the relative errors; the error's variance is a parameter too."""
    m, k = len(values), design.shape[1] + 1
    errors = design @ nonnegative_fit(design, values) / values - 1
    error = max(float((errors**2).sum()), np.finfo(float).tiny)  # a perfect fit has a logarithm too
    return float(m * math.log(error / m) + 2 * k + 2 * k * (k + 1) / (m - k - 1))


def _interval(value: float, drawn: Array) -> Interval:
    lower, upper = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(value), float(lower), float(upper))
