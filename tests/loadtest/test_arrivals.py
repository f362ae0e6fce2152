"""Arrival laws: how many come, how they are spread, and that nobody waits for an answer."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagestream.loadtest.arrivals import ARRIVALS, Constant, Gamma, OpenLoop, Poisson, Ramp, Step, TraceArrivals
from pagestream.loadtest.spec import SpecError, parse

RATES = st.floats(0.5, 200)
SEEDS = st.integers(0, 2**32)


def until(arrivals: OpenLoop, seconds: float, seed: int) -> list[float]:
    return list(itertools.takewhile(lambda at: at < seconds, arrivals.times(Random(seed))))


def assert_poisson_count(count: int, expected: float) -> None:
    """Six standard deviations: a right law fails once in 500 million."""
    assert abs(count - expected) <= 6 * math.sqrt(expected) + 1


@settings(deadline=None, max_examples=50)
@given(rate=RATES, seed=SEEDS)
def test_constant_is_exact(rate: float, seed: int) -> None:
    times = until(Constant(rate), 50 / rate, seed)
    assert times == pytest.approx([index / rate for index in range(len(times))])
    assert len(times) in (50, 51)  # the last may fall on the edge


@settings(deadline=None, max_examples=50)
@given(rate=RATES, seed=SEEDS)
def test_poisson_has_its_rate_in_both_halves(rate: float, seed: int) -> None:
    seconds = 400 / rate
    times = until(Poisson(rate), seconds, seed)
    assert times == sorted(times)
    first = sum(at < seconds / 2 for at in times)
    assert_poisson_count(first, 200)
    assert_poisson_count(len(times) - first, 200)


@settings(deadline=None, max_examples=50)
@given(rate=RATES, burstiness=st.sampled_from((0.25, 1.0, 4.0)), seed=st.integers(0, 50))
def test_gamma_gaps_have_their_mean_and_spread(rate: float, burstiness: float, seed: int) -> None:
    times = list(itertools.islice(Gamma(rate, burstiness).times(Random(seed)), 4000))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean * rate == pytest.approx(1, abs=6 / math.sqrt(burstiness * len(gaps)))
    assert variance / mean**2 == pytest.approx(1 / burstiness, rel=0.5)


@settings(deadline=None, max_examples=50)
@given(start=st.floats(0, 20), end=st.floats(0.5, 20), seed=SEEDS)
def test_ramp_follows_the_integral_of_its_rate(start: float, end: float, seed: int) -> None:
    times = until(Ramp(start, end, seconds=40), 60, seed)
    assert times == sorted(times)
    for begin, to in ((0.0, 20.0), (20.0, 40.0)):
        middle = start + (end - start) * (begin + to) / 2 / 40
        assert_poisson_count(sum(begin <= at < to for at in times), 20 * middle)
    assert_poisson_count(sum(at >= 40 for at in times), 20 * end)


@settings(deadline=None, max_examples=50)
@given(rates=st.lists(st.floats(0.5, 50), min_size=1, max_size=4), seed=SEEDS)
def test_each_step_has_its_rate_and_the_last_stays(rates: list[float], seed: int) -> None:
    times = until(Step(tuple(rates), seconds=10), 10 * (len(rates) + 1), seed)
    assert times == sorted(times)
    for place, rate in enumerate([*rates, rates[-1]]):
        assert_poisson_count(sum(10 * place <= at < 10 * (place + 1) for at in times), 10 * rate)


def test_a_trace_is_replayed_in_order(tmp_path: Path) -> None:
    lines = [{"at": at, "prompt_tokens": 3, "output_tokens": 2} for at in (4.0, 0.5, 1.0)]
    (tmp_path / "trace").write_text("\n".join(map(json.dumps, lines)))
    assert list(TraceArrivals(tmp_path / "trace", speed=2).times(Random(0))) == [0.25, 0.5, 2.0]


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("sometimes", "'sometimes' is none of closed, constant"),
        ("poisson", "poisson needs rate"),
        ("poisson:rate=0", "rate must be above 0"),
        ("poisson:rate=often", "'often' is no value for rate"),
        ("gamma:rate=1,shape=2", "'shape=2' is none of rate=…, burstiness=…"),
        ("closed:concurrency=0", "concurrency must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(typed: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        parse(typed, ARRIVALS)
