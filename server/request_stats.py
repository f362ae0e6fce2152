"""The statistics of one answer: rows and tokens in as they are made, means out when it has ended.

Means are over the rows that the request itself asked for, in double precision. What the server observes for its own
metrics is not among them, so that the same request is told the same numbers however the server is set.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from pagestream.model.routing import RoutingAccumulator
from pagestream.model.step import AttentionSummary, GroupSummary, PageSummary, SampledToken, SpanSummary, StatsLevel
from pagestream.server.ledger import Account
from pagestream.server.metric_families import LAYER_GROUPS
from pagestream.server.stats import (
    AttentionStructure,
    LayerGroupStats,
    OutputStats,
    RequestStats,
    Span,
    SpanStats,
    StatsDetail,
    StatsMeta,
    StatsRequest,
    TokenAttention,
    TokenStats,
)


class StatsRecord:
    """Of one answer that asked for statistics; used by the engine's thread alone."""

    def __init__(self, asked: StatsRequest) -> None:
        self._asked = asked
        self._rows_total = self._rows_observed = 0
        self._next_row = 0  # the token whose row is to be observed next, counted from the first of the answer
        self._latest: TokenAttention | None = None  # of the row that the next token comes from
        self._outputs = _Means()
        self._groups: list[_GroupMeans] = []
        self._bands = _Means()
        self._pages = _Means()
        self._routing = RoutingAccumulator()
        self._spans = [_SpanMeans(span) for span in asked.spans]

    @property
    def wants_output(self) -> bool:
        return self._asked.detail >= StatsDetail.OUTPUT

    @property
    def wants_attention(self) -> StatsLevel:
        """Of the row that its next token comes from."""
        if self._asked.detail < StatsDetail.ATTENTION or self._rows_total < self._next_row:
            return StatsLevel.OFF
        return StatsLevel.PAGES if self._asked.detail is StatsDetail.SPANS else StatsLevel.HEADS

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        return tuple((span.begin, span.end) for span in self._asked.spans)

    def observe(self, row: AttentionSummary) -> None:
        """A row it wanted; tokens follow, the first of them from this row."""
        self._rows_observed += 1
        self._next_row = self._rows_total + self._asked.attention_every
        self._latest = token_attention(row)
        self._groups = self._groups or [_GroupMeans() for _ in row.groups]
        for means, group, bands in zip(self._groups, row.groups, row.bands, strict=True):
            means.add(group)
            self._bands.add(group.heads, **{str(band): mass for band, mass in enumerate(bands)})
        if self._asked.detail is StatsDetail.SPANS and row.pages is not None:
            self._observe_pages(row.context, row.pages, self._latest)

    def _observe_pages(self, context: int, pages: PageSummary, attention: TokenAttention) -> None:
        self._pages.add(
            pages95=pages.pages95,
            concentration=math.log(context) - attention.entropy_nats,
            coherence_heads=pages.coherence_heads,
            coherence_heads_null=pages.coherence_heads_null,
            coherence_layers=pages.coherence_layers,
            coherence_layers_null=pages.coherence_layers_null,
        )
        self._routing.add(pages)
        for means, span in zip(self._spans, pages.spans, strict=True):
            means.add(span)

    def take(
        self, tokens: Sequence[SampledToken], context: int, gaps: Sequence[float | None], account: Account
    ) -> tuple[TokenStats, ...]:
        """Books tokens, the first of them chosen after `context` tokens; what to say of each. What the account and the
        row say is of the first."""
        attention, self._latest = self._latest, None
        self._rows_total += len(tokens)
        told: list[TokenStats] = []
        predicted_gap, stall = account.predicted_gap, account.stall
        for token, gap in zip(tokens, gaps, strict=True):
            told.append(TokenStats(context + len(told), gap, predicted_gap, stall, self._output(token), attention))
            predicted_gap = stall = attention = None
        return tuple(told)

    def _output(self, token: SampledToken) -> OutputStats | None:
        output = token.output
        if output is None or not self.wants_output:
            return None
        self._outputs.add(entropy=output.entropy, surprisal=output.surprisal)
        return OutputStats(output.entropy, output.top1, output.margin, output.surprisal, output.sampling_surprisal)

    def read(self) -> RequestStats:
        return RequestStats(
            meta=StatsMeta(self._rows_observed, self._rows_total, self._asked.page_tokens),
            mean_output_entropy_nats=self._outputs.get("entropy"),
            mean_surprisal_nats=self._outputs.get("surprisal"),
            attention=tuple(means.read(name) for name, means in zip(LAYER_GROUPS, self._groups, strict=False)),
            band_mass=self._bands.all(),
            pages_for_95=self._pages.get("pages95"),
            structure=self._structure(),
            spans=tuple(means.read() for means in self._spans) if self._routing.steps else (),
        )

    def _structure(self) -> AttentionStructure | None:
        routing = self._routing.routing()
        if routing is None:
            return None
        return AttentionStructure(
            concentration_nats=self._pages.mean("concentration"),
            routing_nats=routing,
            coherence_heads=self._pages.get("coherence_heads"),
            coherence_heads_null=self._pages.get("coherence_heads_null"),
            coherence_layers=self._pages.get("coherence_layers"),
            coherence_layers_null=self._pages.get("coherence_layers_null"),
        )


def token_attention(row: AttentionSummary) -> TokenAttention:
    """Means over all layers and heads of a row."""
    heads = sum(group.heads for group in row.groups)
    entropy, sink, recent = (
        sum(group.heads * value for group, value in zip(row.groups, values, strict=True)) / heads
        for values in zip(*((g.entropy, g.sink_mass, g.recent_mass) for g in row.groups), strict=True)
    )
    return TokenAttention(entropy, math.exp(entropy), sink, recent)


class _Means:
    """Weighted means by name."""

    def __init__(self) -> None:
        self._totals: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # sum, weight

    def add(self, weight: float = 1.0, **values: float | None) -> None:
        for name, value in values.items():
            if value is not None and weight:
                total = self._totals[name]
                total[0] += weight * value
                total[1] += weight

    def get(self, name: str) -> float | None:
        """None if there was no value."""
        total, weight = self._totals.get(name, (0.0, 0.0))
        return total / weight if weight else None

    def mean(self, name: str) -> float:
        """0 if there was no value."""
        return self.get(name) or 0.0

    def all(self) -> tuple[float, ...]:
        """In the order in which the names came."""
        return tuple(total / weight for total, weight in self._totals.values())


class _GroupMeans:
    """Of the layers and heads of a third of the network."""

    def __init__(self) -> None:
        self._means = _Means()
        self._low, self._high = math.inf, -math.inf

    def add(self, group: GroupSummary) -> None:
        self._means.add(
            entropy=group.entropy,
            sink=group.sink_mass,
            recent=group.recent_mass,
            middle=max(1 - group.sink_mass - group.recent_mass, 0.0),  # in a short context the two overlap
            p_max=group.p_max,
        )
        self._means.add(group.rest_heads, entropy_rest=group.entropy_rest, log2_distance=group.log2_distance)
        self._low, self._high = min(self._low, group.entropy_min), max(self._high, group.entropy_max)

    def read(self, name: str) -> LayerGroupStats:
        mean = self._means.mean
        return LayerGroupStats(
            group=name,
            entropy_nats=mean("entropy"),
            entropy_rest_nats=mean("entropy_rest"),
            effective_context_tokens=math.exp(mean("entropy")),
            sink_mass=mean("sink"),
            recent_mass=mean("recent"),
            middle_mass=mean("middle"),
            p_max=mean("p_max"),
            mean_log2_distance=mean("log2_distance"),
            entropy_head_min=self._low,
            entropy_head_max=self._high,
        )


class _SpanMeans:
    def __init__(self, span: Span) -> None:
        self._span = span
        self._means = _Means()
        self._largest = 0.0

    def add(self, found: SpanSummary) -> None:
        self._means.add(
            mass=found.mass,
            uniform=found.uniform,
            without_sink=found.mass_without_sink,
            contribution=found.contribution,
        )
        self._largest = max(self._largest, found.max_head_mass)

    def read(self) -> SpanStats:
        mean = self._means.mean
        uniform = mean("uniform")  # 0 if no layer saw it
        return SpanStats(
            name=self._span.name,
            tokens=self._span.end - self._span.begin,
            mass=mean("mass"),
            lift=mean("mass") / uniform if uniform else 0.0,
            mass_without_sink=mean("without_sink"),
            contribution_share=mean("contribution"),
            max_head_mass=self._largest,
        )
