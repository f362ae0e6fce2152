"""What a step costs: a model of its time, fitted to the steps as they run.

    seconds = decode_a, or prefill_a where prompts are read
            + decode_row * rows + decode_b * (sum of their contexts)
            + prefill_b * tokens + prefill_c * (sum of end^2 - start^2 over the prompts' chunks)

A row is a decoded or proposed token. Over a whole prompt of n tokens the last two add up to b n + c n^2, however it was
chunked. The time is from the beginning of a step to that of the next one, while there is work: so what lies between two
steps is in one of them, as it is in the gap between two tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from pagestream.model.step import Chunk

Term = Literal["prefill_a", "prefill_b", "prefill_c", "decode_a", "decode_row", "decode_b"]
Phase = Literal["prefill", "decode"]  # of a step: prefill if it reads any prompt
TERMS: tuple[Term, ...] = get_args(Term)
Array = npt.NDArray[np.float64]

MIN_SAMPLES = 5  # steps of a phase before anything is said of it

_MEMORY = 0.995  # weight of a step against the next of its phase: about the last two hundred count
_RECENT = 0.95  # and in how fast the machine is just now
_RECENT_MIXED = 0.8  # and in how much slower steps are that read prompts beside decodes
_STRAY = 1.5  # times the forecast: what took longer counts as that in the latter
_WEIGHTS = {
    "prefill": 1.0,
    "decode": 1.0,
    "mixed": 0.02,
}  # of a step in the fit; the last decides what others leave open
_REFIT = 64  # steps after which the coefficients are solved for anew
_SHORTEST = 1e-6  # seconds, below which no clock tells
_SLOWEST = 3.0  # times the forecast: what took longer counts as that, since something else was going on
_SCALES = np.array([1.0, 1e2, 1e6, 1.0, 10.0, 1e3])  # of the features, so that they are about 1
_RIDGE = 1e-8  # weight of "costs nothing" against what was seen: decides only what that leaves open
_NORMAL95 = 1.96

# What is true where products with weights take most of the time, and decides what the steps leave open: a step that
# reads a prompt costs as much before its first token as one that decodes, and 16 rows as much as 16 tokens of a prompt.
_ASSUMED = np.array([[1.0, 0.0, 0.0, -1.0, 0.0, 0.0], [0.0, -16.0, 0.0, 0.0, 16.0, 0.0]]) / _SCALES


class Work(NamedTuple):
    """What a step computes, as the model sees it."""

    rows: int = 0  # decoded or proposed tokens
    contexts: int = 0  # tokens that these attend to
    tokens: int = 0  # of prompts
    squares: int = 0  # end^2 - start^2 of their chunks

    @property
    def phase(self) -> Phase:
        return "prefill" if self.tokens else "decode"

    @property
    def is_mixed(self) -> bool:
        return bool(self.rows and self.tokens)

    def beside(self, other: Work) -> Work:
        """Both in one step."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def decodes_at(contexts: Sequence[int]) -> Work:
    """One token each for requests that decode at these contexts."""
    return Work(len(contexts), sum(contexts))


def prompt_from(start: int, end: int) -> Work:
    """Tokens `start` to `end` of a prompt."""
    return Work(tokens=end - start, squares=end * end - start * start)


def work_of(chunks: Iterable[Chunk]) -> Work:
    rows = contexts = tokens = squares = 0
    for chunk in chunks:
        if chunk.is_decode:
            rows += chunk.length
            contexts += chunk.end
        else:
            tokens += chunk.length
            squares += chunk.end * chunk.end - chunk.start * chunk.start
    return Work(rows, contexts, tokens, squares)


@dataclass(frozen=True, slots=True)
class Coefficient:
    """Seconds, never negative, and a 95 % interval."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class CostFit:
    """What the last few hundred steps cost; terms of a phase of which too few were seen are left out."""

    terms: dict[Term, Coefficient]
    samples: dict[Phase, int]  # steps since the start
    max_tokens: dict[Phase, int]  # the longest context in them: beyond, the model extrapolates

    @property
    def crossover_tokens(self) -> float | None:
        """Prompt length b / c at which the quadratic part costs as much as the linear one; None unless the interval of
        c excludes 0, so that there is a quadratic part."""
        b, c = self.terms.get("prefill_b"), self.terms.get("prefill_c")
        return b.value / c.value if b and c and c.lower > 0 else None


class CostModel:
    """Used by one thread. Times are seconds; errors count relative to the time, because they grow with it.

    Least squares with forgetting, towards 0 where nothing is known, and never a negative cost. Steps with and without
    prompts each have a memory of their own, so that hours of decoding wash out nothing that is known of prompts; the
    coefficients are those that fit both. A forecast is theirs times how much slower than that the last twenty steps
    were: a machine has fast and slow phases, in which everything costs more alike. Steps that read prompts beside
    decodes have a factor of their own, of the last five, because they cost more than the sum of both, and little say in
    the coefficients: their chunks are cut to take one time, from which a start cannot be told from what tokens cost.
    """

    def __init__(self) -> None:
        self._memories = {kind: _Memory() for kind in _WEIGHTS}
        self.samples: dict[Phase, int] = {"prefill": 0, "decode": 0}  # steps since the start
        self._max_tokens: dict[Phase, int] = {"prefill": 0, "decode": 0}
        self._values = [0.0] * len(TERMS)  # the coefficients
        self._stale = 0  # steps since they were solved for
        self._slowness = 1.0
        self._mixed = 1.0  # times slower, beside that

    def knows(self, phase: Phase) -> bool:
        """Whether enough steps of it were seen to forecast others."""
        return self.samples[phase] >= MIN_SAMPLES

    def has_seen(self, prompt_tokens: int) -> bool:
        """Whether a prompt of that length was read; beyond, forecasts extrapolate."""
        return prompt_tokens <= self._max_tokens["prefill"]

    def predict(self, work: Work) -> float:
        """Of a step; 0 where nothing is known."""
        return self._factor(work) * self._fitted(work)

    def step_seconds(self, decodes: Work) -> float:
        """Of a step that reads prompts beside these decodes, what does not grow with the prompts."""
        prefill_a, _, _, _, per_row, per_context = self._values
        fixed = prefill_a + per_row * decodes.rows + per_context * decodes.contexts
        return self._factor(decodes._replace(tokens=1)) * fixed

    def prompt_seconds(self, prompts: Work, decodes: Work = Work()) -> float:  # noqa: B008 - immutable
        """The part of it that grows with its prompts."""
        _, per_token, per_square, *_ = self._values
        grows = per_token * prompts.tokens + per_square * prompts.squares
        return self._factor(decodes._replace(tokens=1)) * grows

    def observe(self, work: Work, longest: int, seconds: float) -> float | None:
        """A step took so long, with `longest` the longest context in it. Returns actual time over forecast; None as
        long as there is no forecast."""
        memory = self._memories["mixed" if work.is_mixed else work.phase]
        fitted = self._fitted(work) if self.knows(work.phase) else 0.0
        seconds = max(seconds, _SHORTEST)
        ratio = None
        if fitted > 0:
            forecast = fitted * self._factor(work)
            ratio = seconds / forecast
            seconds = min(seconds, _SLOWEST * forecast)
            memory.add_error(seconds / fitted - 1)
            self._follow(work, seconds / fitted)
        memory.add(_features(work), seconds, fitted or seconds)
        self.samples[work.phase] += 1
        self._max_tokens[work.phase] = max(self._max_tokens[work.phase], longest)
        self._stale += 1
        if self._stale >= _REFIT or not self.knows(work.phase):
            self._solve()
        return ratio

    def fit(self) -> CostFit:
        """Intervals are from the residual variance, and wider where residuals follow each other: what steps a moment
        apart have in common is one observation, not many. They hold the true cost at least 95 % of the time."""
        if self._stale:
            self._solve()
        information, moments, assumed = self._system()
        inverse = np.linalg.inv(information)
        variances = [memory.error_variance for memory in self._memories.values()]
        spread = max(variances) * assumed
        for (kind, memory), variance in zip(self._memories.items(), variances, strict=True):
            spread = spread + _WEIGHTS[kind] ** 2 * variance * _scaled(memory.sums[:-1])
        variance_of_each = np.diag(inverse @ spread @ inverse)  # between the following, but for rounding and weights
        variance_of_each = variance_of_each.clip(min(variances) * np.diag(inverse), max(variances) * np.diag(inverse))
        half = _NORMAL95 * np.sqrt(variance_of_each) / _SCALES
        centre = inverse @ moments / _SCALES
        terms: dict[Term, Coefficient] = {}
        for term, value, lower, upper in zip(TERMS, self._values, centre - half, centre + half, strict=True):
            if self.knows(_phase(term)):
                terms[term] = Coefficient(value, min(max(float(lower), 0.0), value), max(float(upper), value))
        return CostFit(terms, dict(self.samples), dict(self._max_tokens))

    def _factor(self, work: Work) -> float:
        return self._slowness * self._mixed if work.is_mixed else self._slowness

    def _follow(self, work: Work, slowness: float) -> None:
        """A step was so many times slower than fitted."""
        machine = slowness / self._mixed if work.is_mixed else slowness
        if work.is_mixed:
            rate = max(1 - _RECENT_MIXED, 1 / self._memories["mixed"].errors)
            mixed = min(slowness / self._slowness, _STRAY * self._mixed)
            self._mixed += rate * (mixed - self._mixed)
        self._slowness += (1 - _RECENT) * (machine - self._slowness)

    def _fitted(self, work: Work) -> float:
        prefill_a, per_token, per_square, decode_a, per_row, per_context = self._values
        constant = prefill_a if work.tokens else decode_a if work.rows else 0.0
        prompts = per_token * work.tokens + per_square * work.squares
        return constant + prompts + per_row * work.rows + per_context * work.contexts

    def _solve(self) -> None:
        """What would be negative is held at 0, and the rest is fitted again."""
        self._stale = 0
        information, moments, _ = self._system()
        free = np.ones(len(TERMS), dtype=bool)
        while True:
            solution = np.linalg.solve(information[np.ix_(free, free)], moments[free])
            if (solution >= 0).all():
                break
            free[np.flatnonzero(free)[solution < 0]] = False
        values = np.zeros(len(TERMS))
        values[free] = solution
        self._values = (values / _SCALES).tolist()

    def _system(self) -> tuple[Array, Array, Array]:
        """The matrix [6, 6] and the right side [6] of the normal equations, of scaled features; and what part of the
        matrix no step told: the ridge, and `_ASSUMED` as if two steps ten times as long as a decode had said so.
        """
        told = {kind: weight * np.array(self._memories[kind].sums) for kind, weight in _WEIGHTS.items()}
        prompts, decodes = told["prefill"] + told["mixed"], told["decode"]
        prefill, decode = _scaled(prompts[:-1]), _scaled(decodes[:-1])
        least = 1e-3 * np.trace(prefill + decode) + 1e-12  # for a phase that was not seen
        assumed = _RIDGE * np.diag(np.repeat([max(np.trace(part), least) for part in (prefill, decode)], 3))
        per_step = decode[3, 3] / max(min(self.samples["decode"], 1 / (1 - _MEMORY)), 1)
        assumed += per_step / 100 * _ASSUMED.T @ _ASSUMED
        return prefill + decode + assumed, (prompts + decodes)[-1] / _SCALES, assumed


class _Memory:
    """Of the steps of one kind: sums of features times features, in the last row of features times value; and of the
    errors, all with forgetting. In plain lists: after a network has emptied the caches, numpy takes many times as long
    for so few numbers."""

    def __init__(self) -> None:
        self.sums = [[0.0] * len(TERMS) for _ in range(len(TERMS) + 1)]
        self.errors = 0
        self._variance = 0.0  # of actual over fitted time
        self._covariance = 0.0  # of that and the step's before
        self._last_error = 0.0

    def add(self, features: Sequence[tuple[int, float]], value: float, unit: float) -> None:
        """`features` that are not 0, by index, and the value, in units of `unit`."""
        weighted = [(index, feature / unit) for index, feature in features]
        for index, feature in weighted:
            row = self.sums[index]
            for other, factor in weighted:
                row[other] = _MEMORY * row[other] + feature * factor
        last = self.sums[-1]
        for index, feature in weighted:
            last[index] = _MEMORY * last[index] + feature * value / unit

    def add_error(self, error: float) -> None:
        self.errors += 1
        rate = max(1 - _MEMORY, 1 / self.errors)
        self._variance += rate * (error * error - self._variance)
        self._covariance += rate * (error * self._last_error - self._covariance)
        self._last_error = error

    @property
    def error_variance(self) -> float:
        """As if errors did not follow each other."""
        correlation = min(max(self._covariance / self._variance, 0.0), 0.95) if self._variance else 0.0
        return self._variance * (1 + correlation) / (1 - correlation)


def _scaled(information: npt.ArrayLike) -> Array:
    return np.array(information) / np.outer(_SCALES, _SCALES)


def _phase(term: Term) -> Phase:
    return "prefill" if term.startswith("prefill") else "decode"


def _features(work: Work) -> tuple[tuple[int, float], ...]:
    """By index into TERMS."""
    decodes = (4, work.rows), (5, work.contexts)
    return ((0, 1.0), (1, work.tokens), (2, work.squares), *decodes) if work.tokens else ((3, 1.0), *decodes)
