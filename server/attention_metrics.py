"""From the rows of a step to counters: means come out as the ratio of two totals, for whatever span of time one asks.

Each row adds its mean over the heads of a layer group. Contexts above 8,192 tokens share a bucket: by context and layer
group, the full set of buckets would take a fifth of all series.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence

from pagestream.model.step import AttentionSummary, OutputStats
from pagestream.server.dilution import Dilution
from pagestream.server.metric_families import ATTENTION_CTX, LAYER_GROUPS, LabelValues
from pagestream.server.metrics import Metrics

_EDGES = [int(edge) for edge in ATTENTION_CTX[:-1]]


class AttentionMetrics:
    """Records what the server observed by its own sampling; used by the engine's thread alone."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._dilution = [Dilution() for _ in LAYER_GROUPS]

    def record(self, rows: Sequence[AttentionSummary], outputs: Sequence[OutputStats], *, with_pages: bool) -> None:
        """All of one step; `with_pages` if pages were asked of each row."""
        totals: defaultdict[tuple[str, LabelValues], float] = defaultdict(float)
        for row in rows:
            for key, amount in (*_by_group(row), *(_by_page(row) if with_pages else ())):
                totals[key] += amount
            for dilution, group in zip(self._dilution, row.groups, strict=False):
                dilution.add(row.context, group.entropy)
        samples = [("output_entropy_nats", output.entropy, ()) for output in outputs]
        samples += [("output_surprisal_nats", output.surprisal, ()) for output in outputs]
        self._metrics.book([(name, amount, labels) for (name, labels), amount in totals.items()], samples)
        fits = [((layers,), fit) for layers, fit in zip(LAYER_GROUPS, self._dilution, strict=True) if fit.samples]
        slopes: dict[LabelValues, float] = {labels: fit.exponent for labels, fit in fits if fit.exponent is not None}
        self._metrics.set_gauges(
            {
                "attention_dilution_samples": {labels: fit.samples for labels, fit in fits},
                "attention_dilution_exponent": slopes,
            }
        )


def _by_group(row: AttentionSummary) -> Iterator[tuple[tuple[str, LabelValues], float]]:
    ctx, log_context = attention_ctx(row.context), math.log(row.context)
    for layers, group, bands in zip(LAYER_GROUPS, row.groups, row.bands, strict=False):
        with_rest = group.rest_heads / group.heads
        amounts = {
            "rows": 1.0,
            "entropy_nats": group.entropy,
            "log_context": log_context,
            "sink_mass": group.sink_mass,
            "recent_mass": group.recent_mass,
            "p_max": group.p_max,
            "rest_rows": with_rest,
            "entropy_rest_nats": with_rest * group.entropy_rest,
        }
        for name, amount in amounts.items():
            yield (f"attention_{name}_total", (ctx, layers)), amount
        for band, mass in enumerate(bands):
            yield ("attention_band_mass_total", (str(band), layers)), mass


def _by_page(row: AttentionSummary) -> Iterator[tuple[tuple[str, LabelValues], float]]:
    if row.pages is not None:
        labels = (attention_ctx(row.context),)
        yield ("attention_sampled_rows_total", labels), 1.0
        yield ("attention_pages95_total", labels), row.pages.pages95
        if row.pages.head_jsd is not None and row.pages.head_jsd_null is not None:
            yield ("attention_head_jsd_nats_total", labels), row.pages.head_jsd
            yield ("attention_head_jsd_null_nats_total", labels), row.pages.head_jsd_null


def attention_ctx(context: int) -> str:
    return ATTENTION_CTX[bisect_left(_EDGES, context)]
