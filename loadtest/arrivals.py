"""When requests are sent. Open loops decide before the run and never wait for answers; a closed loop waits."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from pagestream.loadtest.spec import require
from pagestream.loadtest.trace import read_trace


class OpenLoop(ABC):
    """Moments in seconds from the beginning of the run, in order."""

    @abstractmethod
    def times(self, random: Random) -> Iterator[float]:
        """Endless, except of a trace."""


@dataclass(frozen=True)
class Closed:
    """So many clients, each of which sends its next request when it has its answer."""

    concurrency: int = 1

    def __post_init__(self) -> None:
        require(self.concurrency >= 1, "concurrency must be at least 1")


@dataclass(frozen=True)
class Constant(OpenLoop):
    """`rate` per second at equal distances."""

    rate: float

    def __post_init__(self) -> None:
        require(self.rate > 0, "rate must be above 0")

    def times(self, random: Random) -> Iterator[float]:  # noqa: ARG002
        return (index / self.rate for index in itertools.count())


@dataclass(frozen=True)
class Gamma(OpenLoop):
    """Gaps from a gamma distribution of mean 1/rate and squared coefficient of variation 1/burstiness."""

    rate: float
    burstiness: float = 1.0  # the distribution's shape: 1 is Poisson, less comes in bursts

    def __post_init__(self) -> None:
        require(self.rate > 0 and self.burstiness > 0, "rate and burstiness must be above 0")

    def times(self, random: Random) -> Iterator[float]:
        scale = 1 / (self.rate * self.burstiness)
        return itertools.accumulate(random.gammavariate(self.burstiness, scale) for _ in itertools.count())


@dataclass(frozen=True)
class Poisson(OpenLoop):
    """`rate` per second, independent of each other."""

    rate: float

    def __post_init__(self) -> None:
        require(self.rate > 0, "rate must be above 0")

    def times(self, random: Random) -> Iterator[float]:
        return (unit / self.rate for unit in _unit_poisson(random))


@dataclass(frozen=True)
class Ramp(OpenLoop):
    """Poisson arrivals whose rate goes from `start` to `end` in so many seconds and stays there."""

    start: float
    end: float
    seconds: float = 60.0

    def __post_init__(self) -> None:
        require(self.start >= 0 and self.end > 0, "start must be at least 0 and end above it")
        require(self.seconds > 0, "seconds must be above 0")

    def times(self, random: Random) -> Iterator[float]:
        """The inverse of the integrated rate turns arrivals of rate 1 into these."""
        slope = (self.end - self.start) / self.seconds
        ramped = (self.start + self.end) / 2 * self.seconds  # arrivals expected while the rate changes
        for unit in _unit_poisson(random):
            if unit >= ramped:
                yield self.seconds + (unit - ramped) / self.end
            else:  # start t + slope t^2 / 2 = unit, in the form that does not cancel
                yield 2 * unit / (self.start + math.sqrt(self.start**2 + 2 * slope * unit))


@dataclass(frozen=True)
class Step(OpenLoop):
    """Poisson arrivals of each of these rates for so many seconds; the last stays."""

    rates: tuple[float, ...]
    seconds: float = 20.0

    def __post_init__(self) -> None:
        require(min(self.rates) > 0 and self.seconds > 0, "rates and seconds must be above 0")

    def times(self, random: Random) -> Iterator[float]:
        begin, passed = 0.0, 0.0  # of the step: its beginning, and the arrivals expected before
        rates = iter(self.rates)
        rate = next(rates)
        for unit in _unit_poisson(random):
            while unit - passed >= rate * self.seconds and (following := next(rates, None)):
                begin, passed, rate = begin + self.seconds, passed + rate * self.seconds, following
            yield begin + (unit - passed) / rate


@dataclass(frozen=True)
class TraceArrivals(OpenLoop):
    """The moments of a recorded trace, `speed` times as fast."""

    file: Path
    speed: float = 1.0

    def __post_init__(self) -> None:
        require(self.speed > 0, "speed must be above 0")
        read_trace(self.file)

    def times(self, random: Random) -> Iterator[float]:  # noqa: ARG002
        return (entry.at / self.speed for entry in read_trace(self.file))


Arrivals = Closed | OpenLoop

ARRIVALS: dict[str, type[Closed] | type[OpenLoop]] = {
    "closed": Closed,
    "constant": Constant,
    "poisson": Poisson,
    "gamma": Gamma,
    "ramp": Ramp,
    "step": Step,
    "trace": TraceArrivals,
}


def _unit_poisson(random: Random) -> Iterator[float]:
    return itertools.accumulate(random.expovariate(1.0) for _ in itertools.count())
