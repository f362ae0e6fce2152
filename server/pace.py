"""How many prompt tokens a step may read beside decodes, so that the gap between their tokens keeps to a target.

The time of a step is modelled as what its decodes cost, a + d * rows + e * contexts (a proposed token is a row), plus
what its prompt chunks cost, b * tokens + c * (tokens times what each attends to). Both halves are fitted to the steps
as they run, each with its own memory, so that hours of decoding do not wash out what is known about prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from pagestream.model.step import StepPlan
from pagestream.server.request import Request

MIN_PROMPT_TOKENS = 8  # beside decodes, whatever the target: a prompt must get on too

_MEMORY = 0.99  # weight of a step against the next one: about the last hundred count
_RIDGE = 1e-6  # weight of "costs nothing" against what was seen: decides only what that leaves open
_SCALE = 1000.0  # tokens: features of about 1


class Pace:
    """Used by the engine's thread alone. Times are seconds."""

    def __init__(self, target_gap: float) -> None:
        self._target_gap = target_gap
        self._decode = _Fit(3)
        self._prompt = _Fit(2)
        self._prompt_seconds = 0.0  # of steps that read prompts, and how many tokens: about the last hundred
        self._prompt_tokens = 0.0

    @property
    def seconds_per_prompt_token(self) -> float:
        """How fast prompts are read, beside what else the steps compute; 0 until one was."""
        return self._prompt_seconds / max(self._prompt_tokens, 1.0)

    def prompt_tokens(self, running: Iterable[Request]) -> int | None:
        """The limit for the next step; None if nothing decodes, so that nobody waits. As if all tokens were those of
        the prompt read furthest, which cost the most.
        """
        contexts = [request.num_tokens for request in running if request.num_uncomputed == 1]
        if not contexts:
            return None
        start = max((request.num_computed for request in running if request.num_uncomputed > 1), default=0)
        decodes = self._decode.predict(_decode_features(len(contexts), contexts))
        left = max(self._target_gap - decodes, decodes / 2)  # a third of the time where the target is out of reach
        per_token, per_attended = self._prompt.coefficients / (_SCALE, _SCALE**2)
        # n tokens from `start` on cost n * per_token + n * (start + n / 2) * per_attended = left
        linear = per_token + start * per_attended
        if linear <= 0:  # nothing is known yet
            return MIN_PROMPT_TOKENS
        tokens = 2 * left / (linear + math.sqrt(linear**2 + 2 * per_attended * left))
        return max(int(tokens), MIN_PROMPT_TOKENS)

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long."""
        prompts = [chunk for chunk in plan.chunks if not chunk.is_decode]
        decoding = [chunk for chunk in plan.chunks if chunk.is_decode]
        decodes = _decode_features(sum(chunk.length for chunk in decoding), [chunk.end for chunk in decoding])
        if not prompts:
            self._decode.add(decodes, seconds)
            return
        tokens = sum(chunk.length for chunk in prompts)
        self._prompt_seconds = _MEMORY * self._prompt_seconds + seconds
        self._prompt_tokens = _MEMORY * self._prompt_tokens + tokens
        attended = sum(chunk.length * (chunk.start + chunk.length / 2) for chunk in prompts)
        features = np.array([tokens / _SCALE, attended / _SCALE**2])
        self._prompt.add(features, seconds - self._decode.predict(decodes))


class _Fit:
    """Least squares with forgetting, towards 0 where nothing is known, and never a negative cost."""

    def __init__(self, size: int) -> None:
        self._moments = np.zeros((size + 1, size + 1))  # of the features, and last the value
        self._solution: npt.NDArray[np.float64] | None = None

    def add(self, features: npt.NDArray[np.float64], value: float) -> None:
        observed = np.append(features, value)
        self._moments *= _MEMORY
        self._moments += observed[:, None] * observed
        self._solution = None

    @property
    def coefficients(self) -> npt.NDArray[np.float64]:
        """Solved for when they are asked for: most steps only decode and need no forecast."""
        if self._solution is None:
            self._solution = self._solve()
        return self._solution

    def _solve(self) -> npt.NDArray[np.float64]:
        size = len(self._moments) - 1
        free = np.ones(size, dtype=bool)
        while True:  # what would be negative is held at 0, and the rest is fitted again
            moments = self._moments[:-1, :-1][np.ix_(free, free)]
            ridge = _RIDGE * max(float(np.trace(moments)), 1e-12) / max(len(moments), 1)
            solution = np.linalg.solve(moments + ridge * np.eye(len(moments)), self._moments[:-1, -1][free])
            if (solution >= 0).all():
                break
            free[np.flatnonzero(free)[solution < 0]] = False
        coefficients = np.zeros(size)
        coefficients[free] = solution
        return coefficients

    def predict(self, features: npt.NDArray[np.float64]) -> float:
        return float(features @ self.coefficients)


def _decode_features(num_rows: int, contexts: list[int]) -> npt.NDArray[np.float64]:
    return np.array([1.0, num_rows / 10, sum(contexts) / _SCALE])
