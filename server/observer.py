"""What is asked of a step beside its tokens, and where the answers go.

Attention costs time to observe, so the server looks at every `every`-th step that decodes, at pages in one of sixteen
of those, and at what requests ask for. Its metrics are of the former alone: requests that ask weigh no more there than
others. The integrity monitor sees every row. What is observed never changes a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pagestream.model.step import AttentionSummary, Chunk, OutputStats, StatsLevel, StepPlan, StepResult
from pagestream.server.attention_metrics import AttentionMetrics
from pagestream.server.contained import contained
from pagestream.server.integrity import IntegrityMonitor
from pagestream.server.job import Job
from pagestream.server.metrics import Metrics
from pagestream.server.scheduler import Advance

PAGES_EVERY = 16  # of the steps observed


class Observer:
    """Used by the engine's thread alone, before and after each step."""

    def __init__(self, metrics: Metrics, every: int, clock: Callable[[], float]) -> None:
        """`every` 0: only what requests ask for."""
        self._every = every
        self._num_steps = 0  # that decoded
        self._level = StatsLevel.OFF  # of the server's own sampling, in this step
        self._metrics = AttentionMetrics(metrics)
        self._integrity = IntegrityMonitor(metrics, clock)

    def ask(self, plan: StepPlan, jobs: Mapping[str, Job]) -> StepPlan:
        """The plan with what is to be observed; mostly the same one."""
        self._level = self._own_level(plan)
        if not self._level and all(jobs[chunk.request_id].record is None for chunk in plan.chunks):
            return plan
        return StepPlan(tuple(self._ask(chunk, jobs[chunk.request_id]) for chunk in plan.chunks))

    def _own_level(self, plan: StepPlan) -> StatsLevel:
        if not self._every or not any(chunk.is_decode for chunk in plan.chunks):
            return StatsLevel.OFF
        number, rest = divmod(self._num_steps, self._every)
        self._num_steps += 1
        if rest:
            return StatsLevel.OFF
        return StatsLevel.HEADS if number % PAGES_EVERY else StatsLevel.PAGES

    def _ask(self, chunk: Chunk, job: Job) -> Chunk:
        own = self._level if chunk.is_decode else StatsLevel.OFF
        record = job.record if chunk.samples else None
        wanted = StatsLevel.OFF if record is None else record.wants_attention
        output = own > StatsLevel.OFF or (record is not None and record.wants_output)
        if not (wanted or output):
            return chunk
        spans = record.spans if record is not None and wanted is StatsLevel.PAGES else ()
        return replace(chunk, attention=max(own, wanted), spans=spans, output_stats=output)

    @contained(None)
    def take(self, plan: StepPlan, result: StepResult, advances: Sequence[Advance], jobs: Mapping[str, Job]) -> None:
        """What was observed of those that got on, before their tokens are told. A row of proposed tokens counts only if
        it was kept; attention is of the first row, which always is."""
        kept = {advance.request.request_id: advance for advance in advances if advance.sampled}
        rows: list[AttentionSummary] = []
        outputs: list[OutputStats] = []
        for chunk, row in zip(plan.chunks, result.attention or [None] * len(plan.chunks), strict=True):
            advance = kept.get(chunk.request_id)
            if advance is None:
                continue
            is_sampled = self._level and chunk.is_decode
            if is_sampled:
                outputs += [token.output for token in advance.sampled if token.output is not None]
            if row is None:
                continue
            self._integrity.check(row, chunk.request_id)
            record = jobs[chunk.request_id].record
            if record is not None and record.wants_attention:
                record.observe(row)
            if is_sampled:
                rows.append(row)
        if rows or outputs:
            self._metrics.record(rows, outputs, with_pages=self._level is StatsLevel.PAGES)

    def non_finite(self, request_id: str) -> None:
        """The network returned no usable distribution for a request."""
        self._integrity.report("nan", request_id, "logits are not finite")
