"""Counters of attention against sums written out, and the slope of dilution against least squares."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.model.step import AttentionSummary
from pagestream.server.attention_metrics import AttentionMetrics
from pagestream.server.dilution import MIN_SAMPLES, Dilution
from pagestream.server.metrics import Metrics
from tests.support.summaries import make_row, output_of

LAYERS = ("early", "middle", "late")
EDGES = (256, 512, 1024, 2048, 4096, 8192)


def varied(context: int, seed: int) -> AttentionSummary:
    """A row whose layer groups differ."""
    chance = np.random.default_rng(seed)
    row = make_row(context)
    groups = tuple(
        replace(
            group, entropy=chance.uniform(0, 5), sink_mass=chance.uniform(), recent_mass=chance.uniform(),
            p_max=chance.uniform(), rest_heads=int(chance.integers(7)), entropy_rest=chance.uniform(0, 5),
        )
        for group in row.groups
    )  # fmt: skip
    return replace(row, groups=groups, bands=tuple(map(tuple, chance.dirichlet(np.ones(16), 3).tolist())))


contexts = st.one_of(st.integers(2, 20_000), st.sampled_from([edge + d for edge in EDGES for d in (0, 1)]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(contexts, st.integers(0, 10**6)), max_size=4), max_size=4), st.booleans())
def test_counters_are_sums_over_rows(
    make_metrics: Callable[..., Metrics], steps: list[list[tuple[int, int]]], with_pages: bool
) -> None:
    metrics = make_metrics()
    recorder = AttentionMetrics(metrics)
    expected: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
    for step in steps:
        rows = [varied(*drawn) for drawn in step]
        recorder.record(rows, [output_of(row.context) for row in rows], with_pages=with_pages)
        for row in rows:
            ctx = next((str(edge) for edge in EDGES if row.context <= edge), "inf")
            for layers, group, bands in zip(LAYERS, row.groups, row.bands, strict=True):
                key = (ctx, layers)
                expected["rows"][key] += 1
                expected["entropy_nats"][key] += group.entropy
                expected["log_context"][key] += math.log(row.context)
                expected["sink_mass"][key] += group.sink_mass
                expected["recent_mass"][key] += group.recent_mass
                expected["p_max"][key] += group.p_max
                expected["rest_rows"][key] += group.rest_heads / group.heads
                expected["entropy_rest_nats"][key] += group.entropy_rest * group.rest_heads / group.heads
                for band, mass in enumerate(bands):
                    expected["band_mass"][str(band), layers] += mass
            if with_pages:
                assert row.pages is not None
                expected["sampled_rows"][ctx,] += 1
                expected["pages95"][ctx,] += row.pages.pages95
                expected["head_jsd_nats"][ctx,] += row.pages.head_jsd or 0
                expected["head_jsd_null_nats"][ctx,] += row.pages.head_jsd_null or 0
    reading = metrics.read()
    names = ["rows", "entropy_nats", "log_context", "sink_mass", "recent_mass", "p_max", "rest_rows"]
    names += ["entropy_rest_nats", "band_mass", "sampled_rows", "pages95", "head_jsd_nats", "head_jsd_null_nats"]
    for name in names:
        assert reading.values[f"attention_{name}_total"] == pytest.approx(dict(expected[name])), name
    assert reading.histograms["output_surprisal_nats"].counts[0, -1] == sum(map(len, steps))


@given(st.integers(0, 2**32), st.integers(MIN_SAMPLES + 10, 400))
def test_the_exponent_is_the_slope_of_weighted_least_squares(seed: int, count: int) -> None:
    chance = np.random.default_rng(seed)
    lengths = chance.integers(64, 8192, count)
    entropies = 0.3 * np.log(lengths) + chance.normal(1, 0.2, count)
    dilution = Dilution()
    dilution.add(10, 100.0)  # too short to count
    for length, entropy in zip(lengths.tolist(), entropies.tolist(), strict=True):
        dilution.add(length, entropy)
    weights = (1 - 1e-4) ** np.arange(count - 1, -1, -1)
    slope, _ = np.polyfit(np.log(lengths), entropies, 1, w=np.sqrt(weights))
    assert dilution.exponent == pytest.approx(slope)
    assert dilution.samples == pytest.approx(weights.sum())


@pytest.mark.parametrize(("count", "longest"), [(MIN_SAMPLES - 1, 8192), (1000, 100)])
def test_there_is_no_exponent_of_few_rows_or_of_contexts_alike(count: int, longest: int) -> None:
    dilution = Dilution()
    for length in np.linspace(64, longest, count).astype(int).tolist():
        dilution.add(length, 1.0)
    assert dilution.exponent is None


def test_uniform_attention_has_exponent_one_and_a_fixed_window_none(make_metrics: Callable[..., Metrics]) -> None:
    metrics = make_metrics()
    rows = []
    for context in range(64, 4096, 16):
        row = make_row(context)
        group = row.groups[0]
        groups = tuple(replace(group, entropy=entropy) for entropy in (math.log(context), 2.0, 0.5 * math.log(context)))
        rows.append(replace(row, groups=groups))
    AttentionMetrics(metrics).record(rows, [], with_pages=False)
    exponents = metrics.read().values["attention_dilution_exponent"]
    assert exponents == pytest.approx({("early",): 1.0, ("middle",): 0.0, ("late",): 0.5}, abs=1e-9)
