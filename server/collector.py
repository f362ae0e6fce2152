"""Exposition: turns what metrics.py recorded into Prometheus families at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pagestream.server.histogram import HistogramReading
from pagestream.server.metric_families import FAMILIES, PREFIX, Family
from pagestream.server.metrics import Metrics


def make_registry(metrics: Metrics) -> CollectorRegistry:
    """All that /metrics shows: our families and the client library's process_* ones."""
    registry = CollectorRegistry()
    registry.register(MetricsCollector(metrics))
    ProcessCollector(registry=registry)
    return registry


class MetricsCollector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        reading = self._metrics.read()
        for family in FAMILIES:
            if family.per_model and reading.model is None:
                continue
            model = (reading.model,) if family.per_model and reading.model is not None else ()
            if family.kind == "histogram":
                yield _histogram(family, model, reading.histograms[family.name])
            else:
                metric = _KINDS[family.kind](PREFIX + family.name, family.meaning, labels=family.label_names)
                for labels, value in reading.values[family.name].items():
                    metric.add_metric(model + labels, value)
                yield metric


_KINDS: dict[str, type[CounterMetricFamily] | type[GaugeMetricFamily]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
}


def _histogram(family: Family, model: tuple[str, ...], reading: HistogramReading) -> HistogramMetricFamily:
    """A ctx without samples is left out: ten of them in each family would be most of all series."""
    metric = HistogramMetricFamily(PREFIX + family.name, family.meaning, labels=family.label_names)
    edges = [*map(str, family.edges), "+Inf"]
    rows = zip(family.series, reading.counts.tolist(), reading.sums.tolist(), strict=True)
    for labels, counts, total in rows:
        if counts[-1] or "ctx" not in family.labels:
            metric.add_metric(model + labels, list(zip(edges, counts, strict=True)), total)
    return metric
