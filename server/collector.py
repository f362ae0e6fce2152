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

    def describe(self) -> Iterator[Metric]:
        """Names for the registry: it refuses doubles and can serve a choice of them, `/metrics?name[]=...`."""
        return map(_new_family, FAMILIES)

    def collect(self) -> Iterator[Metric]:
        reading = self._metrics.read()
        for family in FAMILIES:
            if family.per_model and reading.model is None:
                continue
            model = (reading.model,) if family.per_model and reading.model is not None else ()
            metric = _new_family(family)
            if isinstance(metric, HistogramMetricFamily):
                _add_histograms(metric, family, model, reading.histograms[family.name])
            else:
                for labels, value in reading.values[family.name].items():
                    if value or family.kind != "counter" or "ctx" not in family.labels:
                        metric.add_metric(model + labels, value)
            yield metric


def _new_family(family: Family) -> HistogramMetricFamily | CounterMetricFamily | GaugeMetricFamily:
    name, labels = PREFIX + family.name, family.label_names
    match family.kind:
        case "histogram":
            return HistogramMetricFamily(name, family.meaning, labels=labels)
        case "counter":
            return CounterMetricFamily(name, family.meaning, labels=labels)
        case "gauge":
            return GaugeMetricFamily(name, family.meaning, labels=labels)


def _add_histograms(
    metric: HistogramMetricFamily, family: Family, model: tuple[str, ...], reading: HistogramReading
) -> None:
    """A ctx without samples is left out: ten of them in each family would be most of all series."""
    edges = [*map(str, family.edges), "+Inf"]
    for labels, counts, total in zip(family.series, reading.counts.tolist(), reading.sums.tolist(), strict=True):
        if counts[-1] or "ctx" not in family.labels:
            metric.add_metric(model + labels, list(zip(edges, counts, strict=True)), total)
