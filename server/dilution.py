"""How attention spreads as contexts grow: the slope of entropy on the logarithm of the context, fitted on line.

H = alpha log n + c. alpha 0: focus does not depend on length; 1: it grows in proportion, as uniform attention does. It
describes the model and what it reads, and is no measure of quality.
"""

from __future__ import annotations

import math

MIN_CONTEXT = 64  # tokens; below, the logarithm itself bounds the entropy
MIN_SAMPLES = 100
MIN_DEVIATION = 0.3  # of log n: contexts must differ by about a factor of two before a slope means anything
_MEMORY = 1 - 1e-4  # weight of the past at each row: some 10,000 rows


class Dilution:
    """Of one layer group. Moments are of weighted means (West 1979), which cancel nothing."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._mean_log = self._mean_entropy = 0.0
        self._square = self._product = 0.0  # weighted sums of (x - mean x)^2 and (x - mean x)(y - mean y)

    @property
    def samples(self) -> float:
        """Rows that the slope is of, older ones counting less."""
        return self._weight

    def add(self, context: int, entropy: float) -> None:
        """One row: `context` tokens it could attend to; entropy in nats."""
        if context < MIN_CONTEXT:
            return
        self._weight = self._weight * _MEMORY + 1
        from_log = math.log(context) - self._mean_log
        self._mean_log += from_log / self._weight
        from_entropy = entropy - self._mean_entropy
        self._mean_entropy += from_entropy / self._weight
        kept = 1 - 1 / self._weight  # both deviations are from the old means
        self._square = self._square * _MEMORY + kept * from_log**2
        self._product = self._product * _MEMORY + kept * from_log * from_entropy

    @property
    def exponent(self) -> float | None:
        """None while there are too few rows, or their contexts are too alike."""
        if self._weight < MIN_SAMPLES or self._square < self._weight * MIN_DEVIATION**2:
            return None
        return self._product / self._square
