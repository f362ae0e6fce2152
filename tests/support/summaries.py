"""Made-up attention of rows, as a runner reports it, and a runner that reports it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pagestream.model.step import (
    BANDS,
    AttentionSummary,
    Chunk,
    GroupSummary,
    OutputStats,
    PageSummary,
    SpanSummary,
    StatsLevel,
    StepPlan,
    StepResult,
)
from tests.support.fakes import EchoRunner

PAGE = 16  # tokens


def make_row(context: int, *, entropy: float = 1.0, sink: float = 0.5, num_spans: int = 0) -> AttentionSummary:
    """A row like any other, with pages."""
    group = GroupSummary(
        heads=6,
        entropy=min(entropy, math.log(context)),
        entropy_min=0.0,
        entropy_max=math.log(context),
        sink_mass=sink,
        recent_mass=0.3,
        p_max=0.5,
        rest_heads=6,
        entropy_rest=min(entropy, math.log(context)),
        log2_distance=1.0,
    )
    generator = np.random.default_rng(context)
    heads = generator.dirichlet(np.ones(-(-context // PAGE)), 18).astype(np.float32)
    pages = PageSummary(
        mass=tuple(heads.mean(0).tolist()),
        entropy=float(-(heads * np.log(heads)).sum(-1).mean()),
        pages95=1.5,
        head_jsd=0.4, head_jsd_null=0.6, layer_jsd=0.2, layer_jsd_null=0.3,
        coherence_heads=0.8, coherence_heads_null=0.5, coherence_layers=0.9, coherence_layers_null=0.6,
        spans=(SpanSummary(0.2, 0.3, 0.1, 0.7, 0.5),) * num_spans,
        head_mass=heads.tobytes(),
    )  # fmt: skip
    return AttentionSummary(context, (group,) * 3, ((1.0,) + (0.0,) * (BANDS - 1),) * 3, pages)


class ObservedRunner(EchoRunner):
    """Answers what it is asked for and keeps it. `damage` changes rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[Chunk, AttentionSummary]] = []
        self.damage: Callable[[AttentionSummary], AttentionSummary] = lambda row: row

    def step(self, plan: StepPlan) -> StepResult:
        result = super().step(plan)
        sampled = tuple(
            tuple(replace(token, output=output_of(token.token_id)) for token in tokens)
            if chunk.output_stats
            else tokens
            for chunk, tokens in zip(plan.chunks, result.sampled, strict=True)
        )
        rows = tuple(map(self._row, plan.chunks))
        return StepResult(sampled, rows if any(rows) else ())

    def _row(self, chunk: Chunk) -> AttentionSummary | None:
        if not chunk.attention:
            return None
        row = self.damage(make_row(chunk.observed_position + 1, num_spans=len(chunk.spans)))
        row = row if chunk.attention is StatsLevel.PAGES else replace(row, pages=None)
        self.rows.append((chunk, row))
        return row


def output_of(token_id: int) -> OutputStats:
    return OutputStats(token_id / 100, 0.5, 0.25, token_id / 50, token_id / 60)
