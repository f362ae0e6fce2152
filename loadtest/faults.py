"""What clients do wrong, on purpose: fractions of all requests that are cancelled, cut short or read slowly."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from pagestream.loadtest.spec import require

FaultKind = Literal["cancel", "deadline", "slow", "kill"]

DEADLINE_SECONDS = (0.02, 1.0)  # drawn between these
SLOW_SECONDS = 0.2  # before each message is read


@dataclass(frozen=True)
class Fault:
    kind: FaultKind
    after_tokens: int = 0  # cancel, kill: when so many have arrived
    seconds: float = 0.0  # deadline: of the call; slow: before each message


@dataclass(frozen=True)
class Faults:
    """Fractions, together at most 1. `kill` closes the connection under the call, which then is the only one on it."""

    cancel: float = 0.0
    deadline: float = 0.0
    slow: float = 0.0
    kill: float = 0.0

    def __post_init__(self) -> None:
        fractions = (self.cancel, self.deadline, self.slow, self.kill)
        require(min(fractions) >= 0 and sum(fractions) <= 1, "fractions must be from 0 to 1, together at most 1")

    def draw(self, random: Random, new_tokens: int) -> Fault | None:
        """What happens to one request; the same numbers are drawn whatever the fractions are."""
        which, after = random.random(), random.randrange(new_tokens)
        seconds = random.uniform(*DEADLINE_SECONDS)
        if which < (limit := self.cancel):
            return Fault("cancel", after_tokens=after)
        if which < (limit := limit + self.deadline):
            return Fault("deadline", seconds=seconds)
        if which < (limit := limit + self.slow):
            return Fault("slow", seconds=SLOW_SECONDS)
        if which < limit + self.kill:
            return Fault("kill", after_tokens=after)
        return None
