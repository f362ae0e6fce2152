"""Runs steps so that a failure ends only those at fault."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from pagestream.model.sampling import NonFiniteLogitsError
from pagestream.model.step import Chunk, SampledToken, StepPlan, StepResult

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # so many steps in a row in which every request fails mean that the device is gone


class Runner(Protocol):
    """What the engine needs of model.runner.Runner."""

    def step(self, plan: StepPlan) -> StepResult: ...


class Execution:
    """`is_live` says whether a request has not ended; `end` ends one that failed."""

    def __init__(self, runner: Runner, is_live: Callable[[str], bool], end: Callable[[str, Exception], None]) -> None:
        self._runner = runner
        self._is_live = is_live
        self._end = end
        self._failed_steps = 0  # in a row, for which the device may be to blame
        self.fruitless_steps = 0  # in a row, whoever is to blame

    def run(self, plan: StepPlan) -> StepResult:
        """If the step fails, runs each chunk alone: one may run twice, because all it leaves behind are the keys and
        values of its own positions. Raises what the step raised if the device is gone.
        """
        try:
            result = self._runner.step(plan)
        except Exception as error:
            log.exception("a step of %d requests failed; running each alone", len(plan.chunks))
            result = StepResult(tuple(self._run_alone(chunk) for chunk in plan.chunks))
            device_ran = isinstance(error, NonFiniteLogitsError)  # a request's own prompt or settings may be at fault
            every_one_failed = not any(self._is_live(chunk.request_id) for chunk in plan.chunks)
            self._failed_steps = self._failed_steps + 1 if every_one_failed and not device_ran else 0
            self.fruitless_steps = self.fruitless_steps + 1 if every_one_failed else 0
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise
            return result
        self._failed_steps = self.fruitless_steps = 0
        return result

    def _run_alone(self, chunk: Chunk) -> tuple[SampledToken, ...]:
        if not self._is_live(chunk.request_id):  # another answer to its prompt has failed
            return ()
        try:
            return self._runner.step(StepPlan((chunk.without_proposals(),))).sampled[0]
        except Exception as error:
            log.exception("request %s failed", chunk.request_id)
            self._end(chunk.request_id, error)
            return ()
