"""What the monitor calls damage, and what it does not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pagestream.model.step import AttentionSummary
from pagestream.server.integrity import MIN_REQUESTS, MIN_ROWS, IntegrityMonitor
from pagestream.server.metrics import Metrics
from tests.support.fakes import FakeClock
from tests.support.summaries import make_row

CONTEXT = 400


class Watch:
    """A monitor that has seen `requests` requests with `rows` rows each, of entropy 2 +- 0.3 and a sink around 0.4."""

    def __init__(
        self, metrics: Metrics, requests: int = MIN_REQUESTS, rows: int = -(-MIN_ROWS // MIN_REQUESTS)
    ) -> None:
        self.metrics, self.clock = metrics, FakeClock()
        self.monitor = IntegrityMonitor(metrics, self.clock)
        self._chance = np.random.default_rng(1)
        for number in range(requests):
            for _ in range(rows):
                self.monitor.check(self.usual(), f"r{number}")

    def usual(self, sink: float = 0.4) -> AttentionSummary:
        entropy, factor = self._chance.normal(2, 0.3), self._chance.normal(0, 0.2)
        return make_row(CONTEXT, entropy=entropy, sink=sink * math.exp(factor))

    def events(self, row: AttentionSummary) -> set[str]:
        """Kinds that a row is counted as."""
        before = dict(self.metrics.read().values["integrity_events_total"])
        self.monitor.check(row, "damaged")
        after = self.metrics.read().values["integrity_events_total"]
        return {kind for (kind,), count in after.items() if count > before[kind,]}


@pytest.fixture
def watch(make_metrics: Callable[..., Metrics]) -> Watch:
    return Watch(make_metrics())


def test_usual_rows_are_no_events(watch: Watch) -> None:
    for _ in range(3000):
        watch.monitor.check(watch.usual(), "r")
    assert sum(watch.metrics.read().values["integrity_events_total"].values()) == 0


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (make_row(CONTEXT, sink=0.02), "sink_lost"),
        (make_row(CONTEXT, entropy=math.log(CONTEXT)), "entropy_jump"),
        (make_row(CONTEXT, sink=math.nan), "nan"),
        (make_row(CONTEXT, sink=math.inf), "nan"),
        (make_row(CONTEXT, sink=1.01), "entropy_range"),
        (make_row(CONTEXT, sink=-0.01), "entropy_range"),
        (make_row(CONTEXT, entropy=-0.01), "entropy_range"),
    ],
)
def test_damage_is_one_event_of_its_kind(watch: Watch, row: AttentionSummary, kind: str) -> None:
    assert watch.events(row) == {kind}


def test_a_sink_is_lost_where_all_layers_lose_it_not_where_a_third_looks_elsewhere(watch: Watch) -> None:
    usual, half, none = (make_row(CONTEXT, sink=sink).groups[0] for sink in (0.4, 0.1, 0.07))
    row = make_row(CONTEXT)
    assert watch.events(replace(row, groups=(none, usual, usual))) == set()  # 8.7 deviations
    assert watch.events(replace(row, groups=(half, half, half))) == {"sink_lost"}  # 6.9 each
    assert watch.events(replace(row, groups=(usual, none, none))) == {"sink_lost"}


def test_what_does_not_add_up_is_out_of_range(watch: Watch) -> None:
    row = make_row(CONTEXT)
    assert row.pages is not None
    too_high = replace(row.groups[1], entropy_max=math.log(CONTEXT) + 0.01)
    assert watch.events(replace(row, groups=(row.groups[0], too_high, row.groups[2]))) == {"entropy_range"}
    assert watch.events(replace(row, bands=((0.5,) + (0.0,) * 15,) * 3)) == {"entropy_range"}
    assert watch.events(replace(row, pages=replace(row.pages, mass=row.pages.mass[:-1]))) == {"entropy_range"}
    assert watch.events(replace(row, pages=replace(row.pages, mass=(math.nan,)))) == {"nan"}


def test_nothing_is_unusual_before_there_is_a_usual(make_metrics: Callable[..., Metrics]) -> None:
    lost = make_row(CONTEXT, sink=0.001)
    assert Watch(make_metrics(), requests=MIN_REQUESTS, rows=2).events(lost) == set()
    one_request = Watch(make_metrics(), requests=1, rows=MIN_ROWS)
    assert one_request.events(lost) == set()
    watch = Watch(make_metrics())
    assert watch.events(replace(lost, context=8 * CONTEXT)) == set(), "of that length it has seen nothing"


def test_damage_that_stays_is_told_again_and_is_not_soon_the_norm(watch: Watch) -> None:
    lost = make_row(CONTEXT, sink=0.01)
    assert all(watch.events(lost) == {"sink_lost"} for _ in range(50))


def test_a_model_without_a_sink_loses_none(make_metrics: Callable[..., Metrics]) -> None:
    metrics = make_metrics()
    monitor = IntegrityMonitor(metrics, FakeClock())
    for number in range(300):
        monitor.check(make_row(CONTEXT, entropy=2, sink=0.02), f"r{number}")
    monitor.check(make_row(CONTEXT, entropy=2, sink=0.0), "r")
    assert sum(metrics.read().values["integrity_events_total"].values()) == 0


def test_one_line_a_minute_and_kind_without_texts(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for elapsed in (0, 1, 58, 2):
        watch.clock.now += elapsed
        watch.monitor.check(make_row(CONTEXT, sink=0.01), "damaged")
        watch.monitor.check(make_row(CONTEXT, sink=math.nan), "damaged")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert all("request damaged" in line and f"{CONTEXT} tokens" in line for line in lines)
    assert watch.metrics.read().values["integrity_events_total"] == {
        ("nan",): 4, ("entropy_range",): 0, ("sink_lost",): 4, ("entropy_jump",): 0,
    }  # fmt: skip
