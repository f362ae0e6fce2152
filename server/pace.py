"""How many prompt tokens a step may read beside decodes, so that the gap between their tokens keeps to a target."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pagestream.server.cost_model import CostModel, Work, decodes_at
from pagestream.server.request import Request

MIN_PROMPT_TOKENS = 8  # beside decodes, whatever the target: a prompt must get on too
_AIM = 0.90  # of the target: steps vary, and it is a bound for nearly all of them
_TILE = 16  # rows that kernels compute together: one more than full tiles costs as much as several
_WHOLE_TILES = 48  # tokens from which on a chunk is of full tiles; below, it would lose too many


class Pace:
    """Used by the engine's thread alone. Times are seconds."""

    def __init__(self, target_gap: float) -> None:
        self._target_gap = target_gap
        self.model = CostModel()

    def prompt_tokens(self, running: Iterable[Request]) -> int | None:
        """The limit for the next step; None if nothing decodes, so that nobody waits. As if all tokens were those of
        the prompt read furthest, which cost the most.
        """
        contexts = [request.num_tokens for request in running if request.num_uncomputed == 1]
        if not contexts:
            return None
        start = max((request.num_computed for request in running if request.num_uncomputed > 1), default=0)
        decodes = decodes_at(contexts)
        # n tokens from `start` on cost n * linear + n^2 * square = left
        square = self.model.prompt_seconds(Work(squares=1), decodes)
        linear = self.model.prompt_seconds(Work(tokens=1, squares=2 * start), decodes)
        left = self.seconds_for_prompts(decodes)
        if not self.model.knows("prefill") or linear <= 0:
            return MIN_PROMPT_TOKENS
        tokens = int(2 * left / (linear + math.sqrt(linear**2 + 4 * square * left)))
        return tokens - tokens % _TILE if tokens >= _WHOLE_TILES else max(tokens, MIN_PROMPT_TOKENS)

    def seconds_for_prompts(self, decodes: Work) -> float:
        """Of a step, beside these decodes; a third of the time where the target is out of reach."""
        return max(_AIM * self._target_gap - self.model.step_seconds(decodes), self.model.predict(decodes) / 2)
