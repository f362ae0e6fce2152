"""What the server says of itself on /metrics: counters and histograms before and after a run, gauges while it runs."""

from __future__ import annotations

import asyncio
import json
import math
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from pagestream.loadtest.credentials import ANONYMOUS, Credentials

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]  # (name, sorted labels) -> value

WATCHED = (  # while a run lasts
    "pagestream_kv_cache_usage_ratio",
    "pagestream_running_requests",
    "pagestream_waiting_requests",
    "pagestream_preemptions_total",
    "pagestream_kv_leaked_blocks",
)
_SECONDS = 5.0


class MetricsPage:
    """A server's /metrics. Raises OSError for files of credentials that cannot be used."""

    def __init__(self, url: str, credentials: Credentials = ANONYMOUS) -> None:
        self.url = url
        https = urllib.request.HTTPSHandler(context=credentials.for_https())
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), https)
        self._opener.addheaders += credentials.headers

    def read(self) -> Series:
        """Every sample. Raises OSError if nothing answers, ValueError if it is no exposition."""
        with self._opener.open(self.url, timeout=_SECONDS) as response:
            families = text_string_to_metric_families(response.read().decode())
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }


def total(series: Series, name: str, **labels: str) -> float:
    """The sum of all series of this name that have these labels."""
    return sum(value for (each, have), value in series.items() if each == name and labels.items() <= set(have))


def deltas(before: Series, after: Series) -> Series:
    """What counters and histograms grew by. Series that did not move are left out, but for buckets: the edge of an
    empty one is where the next begins. Gauges are meaningless here."""
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    counts = ("_total", "_count", "_sum")
    return {key: v for key, v in grown.items() if key[0].endswith("_bucket") or (v and key[0].endswith(counts))}


@dataclass(frozen=True)
class Histogram:
    """Cumulative counts at the upper edges, the last of which is infinite."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float], edges: Sequence[float]) -> Histogram:
        """The same buckets filled with these samples."""
        return cls(tuple(edges), tuple(float(sum(sample <= edge for sample in samples)) for edge in edges))

    @property
    def count(self) -> float:
        return self.counts[-1] if self.counts else 0.0

    def quantile(self, q: float) -> float:
        """As PromQL's histogram_quantile: linear inside the bucket in which the q-th sample lies; the last finite edge
        for what lies beyond it. NaN without samples."""
        if not self.count:
            return math.nan
        rank = q * self.count
        place = next(i for i, count in enumerate(self.counts) if count >= rank)
        if math.isinf(self.edges[place]):
            return self.edges[place - 1]
        lower, below = (self.edges[place - 1], self.counts[place - 1]) if place else (0.0, 0.0)
        inside = self.counts[place] - below
        return lower + (self.edges[place] - lower) * ((rank - below) / inside if inside else 1.0)


def histograms(series: Series, name: str, label: str) -> dict[str, Histogram]:
    """By the values of one label; the other labels are summed. Those without samples are missing."""
    found: dict[str, dict[float, float]] = {}
    for (each, labels), value in series.items():
        values = dict(labels)
        if each == f"{name}_bucket" and label in values:
            buckets = found.setdefault(values[label], {})
            edge = float(values["le"])
            buckets[edge] = buckets.get(edge, 0.0) + value
    filled = {value: _filled(buckets) for value, buckets in found.items()}
    return {value: histogram for value, histogram in filled.items() if histogram.count}


def _filled(buckets: Mapping[float, float]) -> Histogram:
    edges = sorted(buckets)
    return Histogram(tuple(edges), tuple(buckets[edge] for edge in edges))


async def watch(page: MetricsPage, path: Path, begin: float, interval: float = 0.5) -> None:
    """Appends a line with the watched gauges every so many seconds until it is cancelled; a scrape that fails is
    missing from the file."""
    with path.open("w") as lines:
        while True:
            try:
                series = await asyncio.to_thread(page.read)
                values = {name: total(series, name) for name in WATCHED}
                lines.write(json.dumps({"at": time.monotonic() - begin, **values}) + "\n")
                lines.flush()
            except (OSError, ValueError):
                pass
            await asyncio.sleep(interval)
