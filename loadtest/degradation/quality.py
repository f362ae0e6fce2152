"""Does it still work at that length? Teacher-forced scores of known answers, with intervals and chance levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pagestream.loadtest.degradation.server import Server
from pagestream.loadtest.degradation.tasks import DEPTHS, FILLERS, Trial
from pagestream.loadtest.statistics import Array, Interval, bootstrap, mean_of, wilson

ABSOLUTE = 0.856  # RULER's threshold: what Llama-2-7B scored at 4k
RELATIVE = 0.85  # NoLiMa's: of the model's own score on short prompts
SHORT = 256  # tokens that count as short
_ROUNDS = 2000


@dataclass(frozen=True)
class Outcome:
    """A trial that was scored."""

    trial: Trial
    logprob: float  # mean over the answer's tokens, nats
    accuracy: float  # share of its tokens that were the most likely one
    exact: bool  # all of them


@dataclass(frozen=True)
class Cell:
    """All trials of one length."""

    tokens: int  # longest prompt and answer
    trials: int
    groups: int
    exact: Interval  # Wilson
    accuracy: Interval  # bootstrap over groups
    logprob: Interval  # bootstrap over groups
    exact_by_depth: dict[str, Interval] | None


@dataclass(frozen=True)
class EffectiveLength:
    """The longest tested length up to which every length does well enough; 0 if not even the shortest does. Intervals
    are of a bootstrap over groups, among tested lengths."""

    score: str  # exact or accuracy
    short_score: float  # of prompts up to SHORT tokens
    absolute: Interval  # score >= ABSOLUTE
    relative: Interval  # score >= RELATIVE * short_score


@dataclass(frozen=True)
class TaskResult:
    cells: list[Cell]
    effective: EffectiveLength | None
    chance: dict[str, float]  # of what a model scores that knows the form and not the content
    note: str


@dataclass(frozen=True)
class PairedPoint:
    """Nats per token that more context saves on the same target tokens, against the shortest context."""

    tokens: int  # of context and target
    windows: int
    nll: Interval
    change: Interval  # paired; below 0 is better than with the shortest context


def score_all(
    server: Server, trials: Sequence[Trial], progress: Callable[[Sequence[Trial]], Iterable[Trial]]
) -> list[Outcome]:
    """In order, so that trials of a group find their common beginning in the prefix cache."""
    outcomes = []
    for trial in progress(trials):
        score = server.score(trial.prompt, trial.answer)
        hits = score.greedy
        outcomes.append(Outcome(trial, float(np.mean(score.logprobs)), float(np.mean(hits)), all(hits)))
    return outcomes


def summarize_task(
    outcomes: Sequence[Outcome], score: str, chance: dict[str, float], note: str, *, effective: bool
) -> TaskResult:
    """Cells by length, and the effective length by `score`, which is exact or accuracy."""
    by_length: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        by_length.setdefault(outcome.trial.length, []).append(outcome)
    cells = [_cell(by_length[length]) for length in sorted(by_length)]
    return TaskResult(cells, effective_length(by_length, score) if effective else None, chance, note)


def _cell(outcomes: Sequence[Outcome]) -> Cell:
    depths = {outcome.trial.depth for outcome in outcomes} - {None}
    by_depth = {
        f"{depth:g}": wilson(sum(each.exact for each in mine), len(mine))
        for depth in DEPTHS
        if (mine := [outcome for outcome in outcomes if outcome.trial.depth == depth])
    }
    accuracies, logprobs = by_group(outcomes, "accuracy"), by_group(outcomes, "logprob")
    return Cell(
        tokens=max(len(outcome.trial.prompt) + len(outcome.trial.answer) for outcome in outcomes),
        trials=len(outcomes),
        groups=len(accuracies),
        exact=wilson(sum(outcome.exact for outcome in outcomes), len(outcomes)),
        accuracy=bootstrap(accuracies, mean_of),
        logprob=bootstrap(logprobs, mean_of),
        exact_by_depth=by_depth if depths else None,
    )


def by_group(outcomes: Sequence[Outcome], name: str) -> Array:
    """Mean of each group: trials of a group are not independent of each other."""
    groups: dict[int, list[float]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.trial.group, []).append(float(getattr(outcome, name)))
    return np.array([np.mean(values) for values in groups.values()])


def effective_length(by_length: dict[int, list[Outcome]], score: str, *, seed: int = 0) -> EffectiveLength:
    """By both definitions, beside the interval of each."""
    lengths = sorted(by_length)
    groups = [by_group(by_length[length], score) for length in lengths]
    random = np.random.default_rng(seed)
    observed = np.array([values.mean() for values in groups])
    drawn = np.stack([random.choice(values, (_ROUNDS, len(values))).mean(1) for values in groups], axis=1)
    short = np.array(lengths) <= max(SHORT, lengths[0])

    def longest(scores: Array, threshold: Array) -> Array:
        """[rounds]: the last length before the first that falls short."""
        held = np.cumprod(scores >= threshold[:, None], axis=1).sum(1)
        return np.asarray(np.array([0, *lengths], float)[held])

    def interval(threshold: Callable[[Array], Array]) -> Interval:
        value = longest(observed[None], threshold(observed[None]))[0]
        lower, upper = np.quantile(longest(drawn, threshold(drawn)), (0.025, 0.975), method="nearest")
        return Interval(float(value), float(lower), float(upper))

    return EffectiveLength(
        score,
        float(observed[short].mean()),
        interval(lambda scores: np.full(len(scores), ABSOLUTE)),
        interval(lambda scores: RELATIVE * scores[:, short].mean(1)),
    )


def summarize_fillers(outcomes: Sequence[Outcome]) -> dict[str, Interval]:
    """Share of passkeys found, by the beginning of the text that they were hidden in: it should not matter."""
    by_filler: dict[str, list[bool]] = {}
    for outcome in outcomes:
        text = FILLERS[outcome.trial.group % len(FILLERS)]
        by_filler.setdefault(text.partition(".")[0], []).append(outcome.exact)
    return {name: wilson(sum(each), len(each)) for name, each in by_filler.items()}


def summarize_pairs(outcomes: Sequence[Outcome]) -> list[PairedPoint]:
    """Of perplexity trials: every group has every length."""
    losses: dict[int, dict[int, float]] = {}
    for outcome in outcomes:
        losses.setdefault(outcome.trial.length, {})[outcome.trial.group] = -outcome.logprob
    lengths = sorted(losses)
    base = losses[lengths[0]]
    points = []
    for length in lengths:
        values = np.array([losses[length][group] for group in base])
        changes = values - np.array(list(base.values()))
        points.append(PairedPoint(length, len(values), bootstrap(values, mean_of), bootstrap(changes, mean_of)))
    return points
