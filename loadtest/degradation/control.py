"""Is it the model, or how it is computed? The same known answers scored by another server of the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pagestream.loadtest.degradation.quality import score_all
from pagestream.loadtest.degradation.server import Server
from pagestream.loadtest.degradation.tasks import Trial
from pagestream.loadtest.statistics import Interval, bootstrap, mean_of

NEGLIGIBLE = 0.02  # nats per token: a difference below it is no degradation


@dataclass(frozen=True)
class ControlPoint:
    """Log-probability per answer token, this server's less the reference's on the same trials."""

    tokens: int
    trials: int
    difference: Interval  # mean; bootstrap over trials
    largest: float  # of any trial, without its sign


def measure_control(
    server: Server,
    reference: Server,
    trials: Sequence[Trial],
    progress: Callable[[Sequence[Trial]], Iterable[Trial]],
) -> list[ControlPoint]:
    """By length. A fault of kernels or of quantisation that grows with the context shows here; what the model itself
    loses is in both."""
    ours, theirs = (score_all(each, trials, progress) for each in (server, reference))
    differences: dict[int, list[float]] = {}
    for mine, other in zip(ours, theirs, strict=True):
        differences.setdefault(mine.trial.length, []).append(mine.logprob - other.logprob)
    return [
        ControlPoint(length, len(each), bootstrap(each, mean_of), max(map(abs, each)))
        for length, each in sorted(differences.items())
    ]
