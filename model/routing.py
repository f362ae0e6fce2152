"""How much where a head looks depends on the step: Phi_route of the observed steps of one answer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagestream.model.step import PageSummary

_NOTHING = 1e-30  # adds nothing to a sum, and has a logarithm


class RoutingAccumulator:
    """Per head, H(mean of P_t) - mean of H(P_t), P_t its distribution over pages at step t: the mutual information of
    step and page. Pages that did not exist yet had no mass.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._sums = np.zeros((0, 0), np.float32)  # [L * Hq, pages]
        self._entropy = 0.0

    def add(self, pages: PageSummary) -> None:
        mass = np.frombuffer(pages.head_mass, np.float32).reshape(-1, len(pages.mass))
        if mass.shape != self._sums.shape:  # a context only grows
            grown = np.zeros_like(mass)
            grown[: len(self._sums), : self._sums.shape[1]] = self._sums
            self._sums = grown
        self._sums += mass
        self._entropy += pages.entropy
        self.steps += 1

    def routing(self) -> float | None:
        """Nats, a mean over heads, not negative; None of fewer than two steps."""
        if self.steps < 2:
            return None
        of_mean = float(entropy(self._sums / self.steps).mean())
        return max(of_mean - self._entropy / self.steps, 0.0)


def entropy(masses: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Of distributions along the last axis, nats."""
    positive = np.maximum(masses, _NOTHING)
    result: npt.NDArray[np.floating] = -np.einsum("...i,...i", positive, np.log(positive))
    return result
