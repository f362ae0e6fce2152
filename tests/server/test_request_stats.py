"""The statistics of one answer against brute force over every layer, head and row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.step import (
    BANDS,
    AttentionSummary,
    GroupSummary,
    PageSummary,
    SampledToken,
    SpanSummary,
    StatsLevel,
)
from pagestream.server.ledger import Account
from pagestream.server.request_stats import StatsRecord
from pagestream.server.stats import RequestStats, Span, StatsDetail, StatsRequest
from tests.support.summaries import PAGE, make_row, output_of

LAYERS, HEADS = 5, 2  # groups of 2, 2 and 1 layers
GROUP_OF = np.arange(LAYERS) * 3 // LAYERS
SPANS = (Span("question", 0, 30), Span("rest", 30, 41))
Array = npt.NDArray[np.float64]


@dataclass
class Row:
    """What each head of each layer did, [L, H, ...]; some leave nothing to others than the first token."""

    context: int
    chance: np.random.Generator

    def __post_init__(self) -> None:
        shape, pages = (LAYERS, HEADS), -(-self.context // PAGE)
        self.entropy = self.chance.uniform(0, math.log(self.context), shape)
        self.sink, self.recent, _ = np.moveaxis(self.chance.dirichlet([1, 1, 1], shape), -1, 0)
        self.p_max = self.chance.uniform(0, 1, shape)
        self.has_rest = self.chance.uniform(0, 1, shape) < 0.8
        self.entropy_rest = self.chance.uniform(0, math.log(self.context), shape)
        self.distance = self.chance.uniform(0, 12, shape)
        self.bands = self.chance.dirichlet(np.ones(BANDS), shape)
        self.pages = self.chance.dirichlet(np.ones(pages), shape).astype(np.float32).astype(np.float64)
        self.spans = self.chance.uniform(0, 0.5, (len(SPANS), *shape))
        self.shares = self.chance.normal(0, 1, (len(SPANS), *shape))
        self.without_sink = self.chance.uniform(0, 1, len(SPANS))
        self.coherences = self.chance.uniform(0, 1, 4).tolist() if self.chance.random() < 0.7 else [None] * 4

    def summary(self, *, with_pages: bool) -> AttentionSummary:
        members = [group == GROUP_OF for group in range(3)]
        return AttentionSummary(
            self.context,
            tuple(map(self._group, members)),
            tuple(tuple(self.bands[layers].mean((0, 1)).tolist()) for layers in members),
            self._pages() if with_pages else None,
        )

    def _group(self, layers: npt.NDArray[np.bool_]) -> GroupSummary:
        rest = self.has_rest[layers]
        count = int(rest.sum())
        return GroupSummary(
            heads=rest.size,
            entropy=self.entropy[layers].mean(),
            entropy_min=self.entropy[layers].min(),
            entropy_max=self.entropy[layers].max(),
            sink_mass=self.sink[layers].mean(),
            recent_mass=self.recent[layers].mean(),
            p_max=self.p_max[layers].mean(),
            rest_heads=count,
            entropy_rest=self.entropy_rest[layers][rest].mean() if count else 0.0,
            log2_distance=self.distance[layers][rest].mean() if count else 0.0,
        )

    def _pages(self) -> PageSummary:
        heads, heads_null, layers, layers_null = self.coherences
        return PageSummary(
            mass=tuple(self.pages.mean((0, 1)).tolist()),
            entropy=page_entropy(self.pages).mean(),
            pages95=self.p_max.sum(),  # any number
            head_jsd=None, head_jsd_null=None, layer_jsd=None, layer_jsd_null=None,
            coherence_heads=heads, coherence_heads_null=heads_null,
            coherence_layers=layers, coherence_layers_null=layers_null,
            spans=tuple(
                SpanSummary(mass.mean(), without, share.mean(), mass.max(), (span.end - span.begin) / self.context)
                for span, mass, without, share in zip(SPANS, self.spans, self.without_sink, self.shares, strict=True)
            ),
            head_mass=self.pages.astype(np.float32).tobytes(),
        )  # fmt: skip


def page_entropy(masses: Array) -> Array:
    return -np.where(masses > 0, masses * np.log(np.where(masses > 0, masses, 1)), 0).sum(-1)


def check_groups(stats: RequestStats, rows: list[Row]) -> None:
    """Each number is a mean over all that it is of, taken at once."""

    def everything(name: str, layers: npt.NDArray[np.bool_]) -> Array:
        return np.stack([getattr(row, name)[layers] for row in rows])

    assert [group.group for group in stats.attention] == ["early", "middle", "late"]
    for number, group in enumerate(stats.attention):
        layers = number == GROUP_OF
        entropy, rest = everything("entropy", layers), everything("has_rest", layers)
        assert group.entropy_nats == pytest.approx(entropy.mean())
        assert group.effective_context_tokens == pytest.approx(math.exp(entropy.mean()))
        assert (group.entropy_head_min, group.entropy_head_max) == (entropy.min(), entropy.max())
        for name, values in (("sink_mass", "sink"), ("recent_mass", "recent"), ("p_max", "p_max")):
            assert getattr(group, name) == pytest.approx(everything(values, layers).mean())
        assert group.sink_mass + group.recent_mass + group.middle_mass == pytest.approx(1)
        if rest.any():
            assert group.entropy_rest_nats == pytest.approx(everything("entropy_rest", layers)[rest].mean())
            assert group.mean_log2_distance == pytest.approx(everything("distance", layers)[rest].mean())
    assert stats.band_mass == pytest.approx(np.mean([row.bands for row in rows], axis=(0, 1, 2)))


def check_pages(stats: RequestStats, rows: list[Row]) -> None:
    assert stats.pages_for_95 == pytest.approx(np.mean([row.p_max.sum() for row in rows]))
    lengths = [span.end - span.begin for span in SPANS]
    for number, (span, length) in enumerate(zip(stats.spans, lengths, strict=True)):
        mass = np.mean([row.spans[number] for row in rows])
        assert (span.name, span.tokens) == (SPANS[number].name, length)
        assert span.mass == pytest.approx(mass)
        assert span.lift == pytest.approx(mass / np.mean([length / row.context for row in rows]))
        assert span.mass_without_sink == pytest.approx(np.mean([row.without_sink[number] for row in rows]))
        assert span.contribution_share == pytest.approx(np.mean([row.shares[number] for row in rows]))
        assert span.max_head_mass == max(row.spans[number].max() for row in rows)
    assert (stats.structure is None) == (len(rows) < 2)
    if stats.structure is None:
        return
    most = max(row.pages.shape[-1] for row in rows)
    over_time = np.array([np.pad(row.pages, [(0, 0), (0, 0), (0, most - row.pages.shape[-1])]) for row in rows])
    routing = page_entropy(over_time.mean(0)) - page_entropy(over_time).mean(0)  # of each head
    concentration = np.mean([math.log(row.context) - row.entropy for row in rows])
    assert stats.structure.routing_nats == pytest.approx(routing.mean(), abs=1e-5)
    assert stats.structure.concentration_nats == pytest.approx(concentration)
    known = [row.coherences for row in rows if row.coherences[0] is not None]
    names = ("coherence_heads", "coherence_heads_null", "coherence_layers", "coherence_layers_null")
    found = [getattr(stats.structure, name) for name in names]
    assert found == (pytest.approx(np.mean(known, axis=0)) if known else [None] * 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.booleans())
def test_means_are_those_over_all_rows_layers_and_heads(seed: int, num_rows: int, with_pages: bool) -> None:
    chance = np.random.default_rng(seed)
    record = StatsRecord(StatsRequest(StatsDetail.SPANS if with_pages else StatsDetail.ATTENTION, 1, SPANS, PAGE))
    contexts = np.sort(chance.integers(41, 400, num_rows)).tolist()
    rows = [Row(context, chance) for context in contexts]
    for row in rows:
        assert record.wants_attention is (StatsLevel.PAGES if with_pages else StatsLevel.HEADS)
        record.observe(row.summary(with_pages=with_pages))
        [token] = record.take([SampledToken(1)], row.context, [None], Account())
        assert token.attention is not None
        assert token.attention.entropy_nats == pytest.approx(row.entropy.mean())
        assert token.attention.effective_context_tokens == pytest.approx(math.exp(row.entropy.mean()))
        assert token.attention.sink_mass == pytest.approx(row.sink.mean())
        assert token.attention.recent_mass == pytest.approx(row.recent.mean())
    stats = record.read()
    assert (stats.meta.rows_observed, stats.meta.rows_total) == (num_rows, num_rows)
    check_groups(stats, rows)
    if with_pages:
        check_pages(stats, rows)
    else:
        assert (stats.pages_for_95, stats.structure, stats.spans) == (None, None, ())


@given(st.integers(1, 20), st.lists(st.integers(1, 8), min_size=1, max_size=30))
def test_a_row_is_due_every_so_many_tokens_however_many_a_step_brings(every: int, runs: list[int]) -> None:
    record = StatsRecord(StatsRequest(StatsDetail.ATTENTION, every))
    expected, observed, made = 0, [], 0
    for count in runs:
        if record.wants_attention:
            record.observe(make_row(100 + made))
            observed.append(made)
        told = record.take([SampledToken(7)] * count, 100 + made, [0.0] * count, Account())
        assert [token.attention is not None for token in told] == [made in observed] + [False] * (count - 1)
        assert [token.context_tokens for token in told] == list(range(100 + made, 100 + made + count))
        made += count
    expected = [0]
    for start in np.cumsum(runs[:-1]).tolist():
        if start >= expected[-1] + every:
            expected.append(start)
    assert observed == expected
    meta = record.read().meta
    assert (meta.rows_observed, meta.rows_total) == (len(expected), sum(runs))


def test_output_is_told_by_token_and_on_average() -> None:
    record = StatsRecord(StatsRequest(StatsDetail.OUTPUT))
    tokens = [SampledToken(token_id, output=output_of(token_id)) for token_id in (30, 60, 120)]
    told = record.take(tokens, 5, [None, 0.1, 0.0], Account())
    assert [token.output.entropy_nats for token in told if token.output] == [0.3, 0.6, 1.2]
    assert [(token.context_tokens, token.gap) for token in told] == [(5, None), (6, 0.1), (7, 0.0)]
    stats = record.read()
    assert stats.mean_output_entropy_nats == pytest.approx(0.7)
    assert stats.mean_surprisal_nats == pytest.approx(1.4)
    assert (stats.attention, stats.band_mass) == ((), ())


def test_without_output_statistics_there_are_no_means_of_them() -> None:
    record = StatsRecord(StatsRequest(StatsDetail.TIMING))
    [token] = record.take([SampledToken(1, output=output_of(1))], 5, [None], Account())  # the server's own sample
    assert token.output is None
    assert record.read().mean_surprisal_nats is None


def test_a_short_context_has_no_middle() -> None:
    """Its first tokens are among its last ones, so their masses overlap."""
    record = StatsRecord(StatsRequest(StatsDetail.ATTENTION))
    record.observe(make_row(20, sink=0.9))
    assert [group.middle_mass for group in record.read().attention] == [0.0] * 3
