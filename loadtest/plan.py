"""One run, fully described by what was typed, so that every worker process works it out for itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from pagestream.loadtest.arrivals import ARRIVALS, Arrivals, Closed
from pagestream.loadtest.faults import Fault, Faults
from pagestream.loadtest.shapes import SHAPES, Session, Shape, Vocabulary
from pagestream.loadtest.spec import SpecError, parse, parse_settings


@dataclass(frozen=True)
class Plan:
    """Both bounds hold; whichever comes first ends the sending. What was sent is waited for."""

    target: str
    shape: str
    arrivals: str
    faults: str
    seed: int
    seconds: float
    sessions: int
    timeout: float  # seconds for each request
    workers: int

    def check(self) -> None:
        """Raises SpecError for what cannot be run."""
        self.parsed_shape()
        self.parsed_faults()
        arrivals = self.parsed_arrivals()
        if isinstance(arrivals, Closed) and arrivals.concurrency < self.workers:
            raise SpecError(f"{self.workers} workers for a concurrency of {arrivals.concurrency}")

    def parsed_shape(self) -> Shape:
        return parse(self.shape, SHAPES)

    def parsed_arrivals(self) -> Arrivals:
        return parse(self.arrivals, ARRIVALS)

    def parsed_faults(self) -> Faults:
        return parse_settings(self.faults, Faults, what="faults")

    def moments(self) -> Iterator[tuple[int, float]]:
        """Index and moment of every session of an open loop."""
        arrivals = self.parsed_arrivals()
        if isinstance(arrivals, Closed):
            raise TypeError("a closed loop has no moments")
        times = itertools.takewhile(lambda at: at < self.seconds, arrivals.times(Random(f"{self.seed} arrivals")))
        return enumerate(itertools.islice(times, self.sessions))

    def clients(self, worker: int) -> int:
        """Of a closed loop: how many this worker plays."""
        arrivals = self.parsed_arrivals()
        concurrency = arrivals.concurrency if isinstance(arrivals, Closed) else 0
        return len(range(worker, concurrency, self.workers))

    def session(self, index: int, vocabulary: Vocabulary) -> tuple[Session, list[Fault | None]]:
        """And for each turn what its client does wrong."""
        session = self.parsed_shape().session(self.seed, index, vocabulary)
        random, faults = Random(f"{self.seed} fault {index}"), self.parsed_faults()
        return session, [faults.draw(random, turn.new_tokens) for turn in session.turns]
