"""Percentiles, intervals and histogram quantiles beside brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.loadtest.measures import collect
from pagestream.loadtest.record import Record
from pagestream.loadtest.scrape import Histogram, deltas, histograms
from pagestream.loadtest.statistics import CTX, Z95, bootstrap, ctx_of, describe, mean_of, median_of, wilson
from pagestream.loadtest.summary import agreement
from pagestream.server.metric_families import CONTEXT_EDGES
from pagestream.server.metric_families import CTX as SERVER_CTX

SECONDS = st.lists(st.floats(1e-4, 100), min_size=1, max_size=60)


def test_lengths_are_the_servers() -> None:
    assert CTX == SERVER_CTX
    for edge in CONTEXT_EDGES:
        assert (ctx_of(edge), ctx_of(edge + 1)) == (str(edge), CTX[CTX.index(str(edge)) + 1])


@settings(deadline=None, max_examples=50)
@given(SECONDS)
def test_percentiles_lie_between_order_statistics(samples: list[float]) -> None:
    ordered, told = sorted(samples), describe(samples)
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)):
        place = q * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        assert told[name] == pytest.approx(low + (high - low) * (place - math.floor(place)))
    assert (told["count"], told["max"]) == (len(samples), ordered[-1])


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_wilson_holds_the_shares_that_the_score_test_keeps(data: st.DataObject) -> None:
    trials = data.draw(st.integers(1, 200))
    hits = data.draw(st.integers(0, trials))
    interval = wilson(hits, trials)
    kept = [
        share
        for share in np.linspace(0.0005, 0.9995, 1999)
        if abs(hits - trials * share) <= Z95 * math.sqrt(trials * share * (1 - share))
    ]
    assert interval.lower == pytest.approx(min(kept), abs=1e-3)
    assert interval.upper == pytest.approx(max(kept), abs=1e-3)
    assert interval.lower <= interval.value <= interval.upper


@pytest.mark.parametrize("statistic", [mean_of, median_of])
def test_bootstrap_against_every_resample_there_is(statistic: object) -> None:
    samples = [1.0, 2.0, 4.0, 7.0, 11.0]
    every = np.array(list(itertools.product(samples, repeat=5)))
    values = every.mean(1) if statistic is mean_of else np.median(every, axis=1)
    interval = bootstrap(samples, statistic, rounds=20_000)  # type: ignore[arg-type]
    assert interval.lower == pytest.approx(np.quantile(values, 0.025), abs=0.25)
    assert interval.upper == pytest.approx(np.quantile(values, 0.975), abs=0.25)


@settings(deadline=None, max_examples=50)
@given(SECONDS)
def test_a_histogram_quantile_lies_in_the_bucket_of_the_sample(samples: list[float]) -> None:
    edges = (0.001, 0.01, 0.1, 1.0, 10.0, math.inf)
    histogram = Histogram.of(samples, edges)
    assert histogram.count == len(samples)
    for q in (0.5, 0.9, 0.99):
        sample = sorted(samples)[math.ceil(q * len(samples)) - 1]
        upper = next(edge for edge in edges if sample <= edge)
        lower = max((edge for edge in edges if edge < sample), default=0.0)
        assert lower <= histogram.quantile(q) <= min(upper, 10.0) or upper == math.inf


def test_quantiles_are_promqls() -> None:
    """The example of Prometheus' own tests of histogram_quantile: 0.1: 1, 0.2: 2, 1: 4, +Inf: 5."""
    histogram = Histogram((0.1, 0.2, 1.0, math.inf), (1.0, 2.0, 4.0, 5.0))
    assert histogram.quantile(0.3) == pytest.approx(0.15)
    assert histogram.quantile(0.6) == pytest.approx(0.6)
    assert histogram.quantile(0.99) == 1.0


def test_only_what_grew_is_told() -> None:
    before = {("a_total", ()): 3.0, ("b_total", ()): 1.0, ("gauge", ()): 5.0}
    after = {("a_total", ()): 5.0, ("b_total", ()): 1.0, ("gauge", ()): 9.0, ("c_count", ()): 2.0}
    assert deltas(before, after) == {("a_total", ()): 2.0, ("c_count", ()): 2.0}


def test_empty_buckets_say_where_the_next_begins() -> None:
    """As in Prometheus, the median of samples between 1 and 2 s does not lie below 1 s."""
    edges = {"1.0": 0.0, "2.0": 4.0, "+Inf": 4.0}
    after = {("t_bucket", (("ctx", "256"), ("le", edge))): count for edge, count in edges.items()}
    after |= {("t_bucket", (("ctx", "512"), ("le", edge))): 0.0 for edge in edges}
    found = histograms(deltas({}, after), "t", "ctx")
    assert set(found) == {"256"}
    assert found["256"].quantile(0.5) == 1.5


@pytest.mark.parametrize(("shift", "within"), [(1.0, True), (1.1, True), (1.4, False)])
def test_agreement_is_told_in_the_servers_buckets(shift: float, within: bool) -> None:
    records = [
        Record(number, 0, "", 100, 2, 0.0, 0.0, tokens=[1 + number / 100, 2.0], output_tokens=2, outcome="ok")
        for number in range(100)
    ]
    edges = (0.5, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, math.inf)
    server = Histogram.of([record.tokens[0] * shift for record in records], edges)
    name = "pagestream_time_to_first_token_seconds_bucket"
    series = {
        (name, (("ctx", "256"), ("le", str(edge)))): count for edge, count in zip(edges, server.counts, strict=True)
    }
    median = next(row for row in agreement(collect(records), series) if row["quantile"] == "p50")
    assert (median["client_count"], median["server_count"], median["within"]) == (100, 100, within)
    assert median["client_exact"] == pytest.approx(1.495)
