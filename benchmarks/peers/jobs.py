"""What is asked of a target, and what comes back: the one vocabulary of clients, workers and scenarios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class FailedError(Exception):
    """A target could not do what was asked; the message says why."""


@dataclass(frozen=True)
class Job:
    """One greedy request that ignores the end of sequence."""

    prompt: list[int]
    new_tokens: int
    at: float = 0.0  # seconds after the beginning of the run
    background: bool = False  # runs until the others are done, then is cancelled


@dataclass(frozen=True)
class Stream:
    """The seconds after a job's arrival at which its tokens came."""

    tokens: list[float]
    at: float  # of the arrival, from the beginning of the run

    @property
    def time_to_first_token(self) -> float:
        return self.tokens[0]

    @property
    def tokens_per_second(self) -> float:
        """After the first."""
        return (len(self.tokens) - 1) / (self.tokens[-1] - self.tokens[0])

    @property
    def end(self) -> float:
        """Seconds from the beginning of the run."""
        return self.at + self.tokens[-1]

    def gaps(self, begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """Between tokens of which the later came in this interval of the run."""
        pairs = zip(self.tokens, self.tokens[1:], strict=False)
        return [later - earlier for earlier, later in pairs if begin <= self.at + later <= end]


class Client(Protocol):
    """Whatever reaches a target."""

    async def run(self, jobs: Sequence[Job]) -> list[Stream]:
        """One stream for each job, in order. FailedError if one had too few tokens, or none."""

    async def close(self) -> None: ...


def checked(jobs: Sequence[Job], moments: Sequence[Sequence[float]]) -> list[Stream]:
    """`moments` are seconds from the beginning of the run."""
    for job, stamps in zip(jobs, moments, strict=True):
        if not stamps or (len(stamps) != job.new_tokens and not job.background):
            raise FailedError(f"{len(stamps)} tokens came for a prompt of {len(job.prompt)}, not {job.new_tokens}")
    return [Stream([moment - job.at for moment in stamps], job.at) for job, stamps in zip(jobs, moments, strict=True)]
